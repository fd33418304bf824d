// Loops over magnitudes: the largest, and sums of importance by magnitude or by bin.
#ifndef HSWQ_HISTOGRAM_INL_
#define HSWQ_HISTOGRAM_INL_

#include "floats.inl"
#include "kernels.h"

namespace hswq {
namespace {

// Without their signs, bit patterns order as the magnitudes do, with NaN above infinity.
float MaxAbs(DType dtype, const void* weights, size_t count) {
  if (dtype == DType::kFloat32) {
    const auto* __restrict typed = static_cast<const float*>(weights);
    uint32_t largest = 0;
    for (size_t i = 0; i < count; ++i) {
      const uint32_t magnitude = BitsOf(typed[i]) & 0x7fffffff;
      largest = magnitude > largest ? magnitude : largest;
    }
    return FloatOf(largest);
  }
  const auto* __restrict typed = static_cast<const uint16_t*>(weights);
  uint16_t largest = 0;
  for (size_t i = 0; i < count; ++i) {
    const auto magnitude = static_cast<uint16_t>(typed[i] & 0x7fff);
    largest = magnitude > largest ? magnitude : largest;
  }
  return dtype == DType::kFloat16 ? Float16::ToFloat(largest) : BFloat16::ToFloat(largest);
}

void MagnitudeHistogram(const uint16_t* __restrict weights, size_t count,
                        const int64_t* __restrict importance, int64_t* __restrict sums) {
  for (size_t i = 0; i < count; ++i) sums[weights[i] & 0x7fff] += importance[i];
}

template <typename Format>
void BinBlock(const typename Format::Storage* __restrict weights, size_t count,
              const int64_t* __restrict importance, float width, size_t bins,
              int64_t* __restrict sums) {
  // Indices go through a short buffer, so that the divisions are vectorised and only the scattered
  // additions are not.
  constexpr size_t kChunk = 1024;
  int32_t indices[kChunk];
  const auto last = static_cast<int32_t>(bins - 1);
  for (size_t begin = 0; begin < count; begin += kChunk) {
    const size_t length = count - begin < kChunk ? count - begin : kChunk;
    for (size_t i = 0; i < length; ++i) {
      const float ratio = Magnitude(Format::ToFloat(weights[begin + i])) / width;
      // False for NaN, which is 0 / 0 where the width underflowed.
      const float positive = ratio > 0.0f ? ratio : 0.0f;
      const auto index = static_cast<int32_t>(positive < 0x1p30f ? positive : 0x1p30f);
      indices[i] = index < last ? index : last;
    }
    for (size_t i = 0; i < length; ++i) sums[indices[i]] += importance[begin + i];
  }
}

void BinHistogram(DType dtype, const void* weights, size_t count, const int64_t* importance,
                  float width, size_t bins, int64_t* sums) {
  WithFormat(dtype, [=](auto format) {
    using Format = decltype(format);
    const auto* typed = static_cast<const typename Format::Storage*>(weights);
    BinBlock<Format>(typed, count, importance, width, bins, sums);
  });
}

}  // namespace
}  // namespace hswq

#endif  // HSWQ_HISTOGRAM_INL_
