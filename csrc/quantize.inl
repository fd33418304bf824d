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
  constexpr size_t kLine = kLanes<uint16_t>;
  size_t i = 0;
  for (; i + kLine <= count; i += kLine) {
    PrefetchAhead(weights + i);
    for (size_t first = i; first < i + kLine; first += kGroup) {
      uint64_t group = 0;
      for (size_t k = 0; k < kGroup; ++k) group |= uint64_t{table[weights[first + k]]} << (8 * k);
      std::memcpy(codes + first, &group, sizeof(group));
    }
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

// The values themselves, which bfloat16 holds: 16-bit integers alone, twice as many in a vector.
void DecodeToBFloat16(const uint8_t* __restrict codes, size_t count, uint16_t* __restrict values) {
  // What rounding the float32 NaN of DecodeE4m3 gives.
  constexpr uint16_t kNaN = 0x7ff0;
  for (size_t i = 0; i < count; ++i) {
    const uint16_t magnitude = codes[i] & 0x7f;
    // The mantissa moves up to bfloat16's, the exponent's bias from 7 to 127.
    const auto normal = static_cast<uint16_t>((magnitude << 4) + (120 << 7));
    // 4, 5, 6, 7 times 2^-9, then 2 and 3, then 1 and 0.
    const auto upper = static_cast<uint16_t>((magnitude << 5) + 0x3b80);
    const auto lower = static_cast<uint16_t>((magnitude << 6) + 0x3b00);
    const uint16_t least = magnitude == 0 ? 0 : 0x3b00;
    const uint16_t subnormal = magnitude >= 4 ? upper : magnitude >= 2 ? lower : least;
    const uint16_t finite = magnitude >= 8 ? normal : subnormal;
    const uint16_t value = magnitude == kE4m3NaN ? kNaN : finite;
    values[i] = static_cast<uint16_t>(value | ((codes[i] & 0x80) << 8));
  }
}

template <typename Format>
void DequantizeByTable(const uint8_t* __restrict codes, size_t count, float scale,
                       typename Format::Storage* __restrict values) {
  constexpr size_t kCodes = 256;
  uint8_t every_code[kCodes];
  for (size_t code = 0; code < kCodes; ++code) every_code[code] = static_cast<uint8_t>(code);
  typename Format::Storage table[kCodes];
  DequantizeBlock<Format>(every_code, kCodes, scale, table);
  for (size_t i = 0; i < count; ++i) values[i] = table[codes[i]];
}

void DequantizeE4m3(const uint8_t* codes, size_t count, float scale, DType dtype, void* values) {
  if (dtype == DType::kBFloat16 && scale == 1.0f) {
    DecodeToBFloat16(codes, count, static_cast<uint16_t*>(values));
    return;
  }
  WithFormat(dtype, [=](auto format) {
    using Format = decltype(format);
    auto* typed = static_cast<typename Format::Storage*>(values);
    // Looking a 16-bit value up is quicker than rounding to it, once the table has paid for itself.
    if (dtype == DType::kFloat32 || count < 1024) {
      DequantizeBlock<Format>(codes, count, scale, typed);
    } else {
      DequantizeByTable<Format>(codes, count, scale, typed);
    }
  });
}

}  // namespace
}  // namespace hswq

#endif  // HSWQ_QUANTIZE_INL_
