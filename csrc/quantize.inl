// Loops over codepoints: encode and decode.
#ifndef HSWQ_QUANTIZE_INL_
#define HSWQ_QUANTIZE_INL_

#include <cstring>

#include "e4m3.h"
#include "floats.inl"
#include "kernels.h"

namespace hswq {
namespace {

template <typename Format>
void QuantizeBlock(const typename Format::Storage* __restrict weights, size_t count, float amax,
                   float scale, uint8_t* __restrict codes) {
  for (size_t i = 0; i < count; ++i) {
    const float value = Format::ToFloat(weights[i]);
    // Comparisons, not min and max: NaN passes, and -0 stays -0 where amax is 0.
    const float raised = value < -amax ? -amax : value;
    const float clipped = raised > amax ? amax : raised;
    codes[i] = static_cast<uint8_t>(EncodeE4m3(BitsOf(clipped / scale)));
  }
}

void QuantizeE4m3(DType dtype, const void* weights, size_t count, float amax, float scale,
                  uint8_t* codes) {
  WithFormat(dtype, [=](auto format) {
    using Format = decltype(format);
    const auto* typed = static_cast<const typename Format::Storage*>(weights);
    QuantizeBlock<Format>(typed, count, amax, scale, codes);
  });
}

// Eight codes at a time are put together in a register: one store instead of eight.
void LookUpCodes(const uint16_t* __restrict weights, size_t count, const uint8_t* __restrict table,
                 uint8_t* __restrict codes) {
  constexpr size_t kGroup = 8;
  size_t i = 0;
  for (; i + kGroup <= count; i += kGroup) {
    uint64_t group = 0;
    for (size_t k = 0; k < kGroup; ++k) group |= uint64_t{table[weights[i + k]]} << (8 * k);
    std::memcpy(codes + i, &group, sizeof(group));
  }
  for (; i < count; ++i) codes[i] = table[weights[i]];
}

template <typename Format>
void DequantizeBlock(const uint8_t* __restrict codes, size_t count, float scale,
                     typename Format::Storage* __restrict values) {
  for (size_t i = 0; i < count; ++i) {
    values[i] = Format::FromFloat(FloatOf(DecodeE4m3(codes[i])) * scale);
  }
}

void DequantizeE4m3(const uint8_t* codes, size_t count, float scale, DType dtype, void* values) {
  WithFormat(dtype, [=](auto format) {
    using Format = decltype(format);
    using Storage = typename Format::Storage;
    auto* typed = static_cast<Storage*>(values);
    // Looking a value up is quicker than computing it, once the table has paid for itself.
    constexpr size_t kCodes = 256;
    if (count < 4 * kCodes) {
      DequantizeBlock<Format>(codes, count, scale, typed);
      return;
    }
    uint8_t every_code[kCodes];
    for (size_t code = 0; code < kCodes; ++code) every_code[code] = static_cast<uint8_t>(code);
    Storage table[kCodes];
    DequantizeBlock<Format>(every_code, kCodes, scale, table);
    for (size_t i = 0; i < count; ++i) typed[i] = table[codes[i]];
  });
}

}  // namespace
}  // namespace hswq

#endif  // HSWQ_QUANTIZE_INL_
