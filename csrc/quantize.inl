// Loops over codepoints: encode and decode.
#ifndef HSWQ_QUANTIZE_INL_
#define HSWQ_QUANTIZE_INL_

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
    DequantizeBlock<Format>(codes, count, scale, static_cast<typename Format::Storage*>(values));
  });
}

}  // namespace
}  // namespace hswq

#endif  // HSWQ_QUANTIZE_INL_
