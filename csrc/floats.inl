// The float formats of weights and activations: bits to float32 and back, by integers alone.
#ifndef HSWQ_FLOATS_INL_
#define HSWQ_FLOATS_INL_

#include "e4m3.h"
#include "kernels.h"

namespace hswq {
namespace {

struct Float16 {
  using Storage = uint16_t;
  static float ToFloat(uint16_t half) {
    const uint32_t magnitude = half & 0x7fff;
    const uint32_t normal = (magnitude << 13) + (112u << 23);
    // Infinity and NaN move on to the largest float32 exponent.
    const uint32_t special = normal + (112u << 23);
    // 2^-14 * (1 + m / 1024) - 2^-14 is exact and meets no subnormal float32.
    const uint32_t subnormal = BitsOf(FloatOf(normal + (1u << 23)) - 0x1p-14f);
    const uint32_t finite = magnitude < 0x400 ? subnormal : normal;
    const uint32_t bits = magnitude < 0x7c00 ? finite : special;
    return FloatOf(bits | (static_cast<uint32_t>(half & 0x8000) << 16));
  }

  static uint16_t FromFloat(float value) {
    const uint32_t bits = BitsOf(value);
    const uint32_t magnitude = bits & 0x7fffffff;
    const uint32_t rounded = RoundMagnitude<10, 15>(magnitude);
    const uint32_t saturated = rounded < 0x7c00 ? rounded : 0x7c00;
    const uint32_t code = magnitude > kFloatInfinity ? 0x7e00 : saturated;
    return static_cast<uint16_t>(code | ((bits >> 16) & 0x8000));
  }
};

struct BFloat16 {
  using Storage = uint16_t;
  static float ToFloat(uint16_t half) { return FloatOf(static_cast<uint32_t>(half) << 16); }

  static uint16_t FromFloat(float value) {
    const uint32_t bits = BitsOf(value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const uint32_t quiet_nan = (bits >> 16) | 0x40;
    return static_cast<uint16_t>((bits & 0x7fffffff) > kFloatInfinity ? quiet_nan : rounded);
  }
};

struct Float32 {
  using Storage = float;
  static float ToFloat(float value) { return value; }
  static float FromFloat(float value) { return value; }
};

// Calls function(Format{}) with the format of a dtype.
template <typename Function>
inline void WithFormat(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::kFloat16:
      return function(Float16{});
    case DType::kBFloat16:
      return function(BFloat16{});
    case DType::kFloat32:
      return function(Float32{});
  }
}

// Asks for memory that is read soon. The processor's own prefetcher stops at the end of each page,
// and pages are small where the caller's allocator made them.
inline void Prefetch(const void* address) { __builtin_prefetch(address); }
inline void PrefetchAhead(const void* address) {
  Prefetch(static_cast<const char*>(address) + 4096);
}

inline float Magnitude(float value) { return FloatOf(BitsOf(value) & 0x7fffffff); }

}  // namespace
}  // namespace hswq

#endif  // HSWQ_FLOATS_INL_
