// Loops over magnitudes: the largest, and sums of importance by magnitude or by bin.
#ifndef HSWQ_HISTOGRAM_INL_
#define HSWQ_HISTOGRAM_INL_

#include "floats.inl"
#include "kernels.h"

namespace hswq {
namespace {

// Without their signs, bit patterns order as the magnitudes do, with NaN above infinity.
template <typename Bits>
inline Bits LargestMagnitude(const void* weights, size_t rows, size_t stride, size_t columns) {
  constexpr Bits kMask = static_cast<Bits>(-1) >> 1;
  const auto* typed = static_cast<const Bits*>(weights);
  Bits largest = 0;
  for (size_t row = 0; row < rows; ++row) {
    const Bits* __restrict values = typed + row * stride;
    for (size_t c = 0; c < columns; ++c) {
      const Bits magnitude = values[c] & kMask;
      largest = magnitude > largest ? magnitude : largest;
    }
  }
  return largest;
}

float MaxAbs(DType dtype, const void* weights, size_t rows, size_t stride, size_t columns) {
  if (stride == columns) {
    columns *= rows;
    rows = 1;
  }
  if (dtype == DType::kFloat32) {
    return FloatOf(LargestMagnitude<uint32_t>(weights, rows, stride, columns));
  }
  const auto largest = LargestMagnitude<uint16_t>(weights, rows, stride, columns);
  return dtype == DType::kFloat16 ? Float16::ToFloat(largest) : BFloat16::ToFloat(largest);
}

// sums[|w[row][c]|] += importance[c] over the next Rows rows. An importance serves all of them: the
// table of sums needs the first cache for itself.
template <size_t Rows>
inline void AddMagnitudes(const uint16_t* __restrict weights, size_t stride, size_t columns,
                          const int64_t* __restrict importance, int64_t* __restrict sums) {
  constexpr size_t kChunk = 32;
  for (size_t begin = 0; begin < columns; begin += kChunk) {
    const size_t end = columns - begin < kChunk ? columns : begin + kChunk;
    for (size_t row = Rows; row < 2 * Rows; ++row) Prefetch(weights + row * stride + begin);
    for (size_t c = begin; c < end; ++c) {
      for (size_t row = 0; row < Rows; ++row) {
        sums[weights[row * stride + c] & 0x7fff] += importance[c];
      }
    }
  }
}

void MagnitudeHistogram(const uint16_t* weights, size_t rows, size_t stride, size_t columns,
                        const int64_t* importance, int64_t* sums) {
  size_t row = 0;
  for (; row + 8 <= rows; row += 8) {
    AddMagnitudes<8>(weights + row * stride, stride, columns, importance, sums);
  }
  for (; row < rows; ++row) {
    AddMagnitudes<1>(weights + row * stride, stride, columns, importance, sums);
  }
}

template <typename Format>
void BinRow(const typename Format::Storage* __restrict weights, size_t count,
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

void BinHistogram(DType dtype, const void* weights, size_t rows, size_t stride, size_t columns,
                  const int64_t* importance, float width, size_t bins, int64_t* sums) {
  WithFormat(dtype, [=](auto format) {
    using Format = decltype(format);
    const auto* typed = static_cast<const typename Format::Storage*>(weights);
    for (size_t row = 0; row < rows; ++row) {
      BinRow<Format>(typed + row * stride, columns, importance, width, bins, sums);
    }
  });
}

}  // namespace
}  // namespace hswq

#endif  // HSWQ_HISTOGRAM_INL_
