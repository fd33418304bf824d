// One E4M3 codepoint: bits of a float32 in, bits of a float32 out. Branch-free: integers, and one
// float addition whose rounding is the one wanted.
//
// Every function here is static on purpose. The ISA files are compiled with different flags, and
// the linker would otherwise keep one shared copy, perhaps one that an older CPU cannot run.
#ifndef HSWQ_E4M3_H_
#define HSWQ_E4M3_H_

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace hswq {

constexpr uint32_t kFloatInfinity = 0x7f800000;
// 448, the largest E4M3 magnitude.
constexpr uint32_t kE4m3MaxBits = 0x43e00000;
constexpr uint32_t kE4m3NaN = 0x7f;
constexpr size_t kE4m3Magnitudes = 127;

static inline uint32_t BitsOf(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

static inline float FloatOf(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Rounds a float32 magnitude (bits without the sign, at most infinity) to a float of kMantissaBits
// and exponent bias kBias: nearest, ties to even, subnormals included. What overflows is left to
// the caller: the result then exceeds the largest finite code. Needs rounding to nearest and
// subnormals kept (ScopedFloatEnvironment).
template <uint32_t kMantissaBits, uint32_t kBias>
static inline uint32_t RoundMagnitude(uint32_t magnitude) {
  constexpr uint32_t kDropped = 23 - kMantissaBits;
  const uint32_t odd = (magnitude >> kDropped) & 1;
  const uint32_t below_half = (1u << (kDropped - 1)) - 1;
  const uint32_t normal =
      ((magnitude + below_half + odd) >> kDropped) - ((127 - kBias) << kMantissaBits);
  // The float whose last place is the target's smallest subnormal: an addition rounds to it.
  constexpr uint32_t kUnitBits = (127 + 23 + 1 - kBias - kMantissaBits) << 23;
  const uint32_t subnormal = BitsOf(FloatOf(magnitude) + FloatOf(kUnitBits)) - kUnitBits;
  constexpr uint32_t kSmallestNormal = (128 - kBias) << 23;
  return magnitude < kSmallestNormal ? subnormal : normal;
}

// Returns the codepoint nearest to the float32 with these bits: ties to even, saturating at +-448,
// infinities too; NaN becomes 0x7F plus its sign.
static inline uint32_t EncodeE4m3(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t clipped = magnitude < kE4m3MaxBits ? magnitude : kE4m3MaxBits;
  const uint32_t rounded = RoundMagnitude<3, 7>(clipped);
  return ((bits >> 24) & 0x80) | (magnitude > kFloatInfinity ? kE4m3NaN : rounded);
}

// Returns the float32 bits of a codepoint, which is exact; 0x7F and 0xFF are NaN.
static inline uint32_t DecodeE4m3(uint32_t code) {
  const uint32_t magnitude = code & 0x7f;
  const uint32_t normal = (magnitude << 20) + (120u << 23);
  // 2^-6 * (1 + m / 8) - 2^-6 is exact and meets no subnormal float32.
  const uint32_t subnormal = BitsOf(FloatOf(normal + (1u << 23)) - 0x1p-6f);
  const uint32_t finite = magnitude < 8 ? subnormal : normal;
  return ((code & 0x80) << 24) | (magnitude == kE4m3NaN ? 0x7ff00000 : finite);
}

// The ladder of magnitudes m_0 = 0 < ... < m_126 = 448 as the search sees it: the step from m_k to
// m_{k+1} and the midpoint between them. Padded with zero steps to a whole number of vectors.
struct E4m3Ladder {
  static constexpr size_t kSize = 128;
  double step[kSize];
  double midpoint[kSize];
};

static constexpr double E4m3Magnitude(size_t code) {
  double value = code < 8 ? static_cast<double>(code) : static_cast<double>(8 + code % 8);
  for (size_t exponent = code < 8 ? 1 : code / 8; exponent < 10; ++exponent) value /= 2;
  for (size_t exponent = 10; exponent < code / 8; ++exponent) value *= 2;
  return value;
}

static constexpr E4m3Ladder MakeE4m3Ladder() {
  E4m3Ladder ladder{};
  for (size_t k = 0; k + 1 < kE4m3Magnitudes; ++k) {
    ladder.step[k] = E4m3Magnitude(k + 1) - E4m3Magnitude(k);
    ladder.midpoint[k] = (E4m3Magnitude(k + 1) + E4m3Magnitude(k)) / 2;
  }
  return ladder;
}

constexpr E4m3Ladder kE4m3Ladder = MakeE4m3Ladder();

static_assert(E4m3Magnitude(1) == 0x1p-9 && E4m3Magnitude(8) == 0x1p-6, "E4M3 subnormals");
static_assert(E4m3Magnitude(126) == 448.0, "largest E4M3 magnitude");

}  // namespace hswq

#endif  // HSWQ_E4M3_H_
