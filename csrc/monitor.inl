// Loops over activations: moments and channel magnitudes.
#ifndef HSWQ_MONITOR_INL_
#define HSWQ_MONITOR_INL_

#include "floats.inl"
#include "kernels.h"

namespace hswq {
namespace {

// Enough lanes to hide the latency of the additions, and too many for the compiler to unroll the
// loop over them before it is vectorised.
constexpr size_t kSumLanes = 32;

inline double SumOfLanes(double* lanes) {
  for (size_t half = kSumLanes / 2; half > 0; half /= 2) {
    for (size_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

template <typename Format>
void MomentsBlock(const typename Format::Storage* __restrict values, size_t count,
                  double* __restrict sums) {
  double sum[kSumLanes] = {};
  double square[kSumLanes] = {};
  const auto add = [&](size_t i, size_t lane) {
    const double value = Format::ToFloat(values[i]);
    sum[lane] += value;
    square[lane] += value * value;
  };
  size_t i = 0;
  for (; i + kSumLanes <= count; i += kSumLanes) {
    for (size_t lane = 0; lane < kSumLanes; ++lane) add(i + lane, lane);
  }
  for (size_t lane = 0; i + lane < count; ++lane) add(i + lane, lane);
  sums[0] = SumOfLanes(sum);
  sums[1] = SumOfLanes(square);
}

void Moments(DType dtype, const void* values, size_t count, double* sums) {
  WithFormat(dtype, [=](auto format) {
    using Format = decltype(format);
    MomentsBlock<Format>(static_cast<const typename Format::Storage*>(values), count, sums);
  });
}

template <typename Format>
inline double AbsValue(typename Format::Storage value) {
  return static_cast<double>(Magnitude(Format::ToFloat(value)));
}

template <typename Format>
inline double AbsSum(const typename Format::Storage* __restrict values, size_t count) {
  double sum[kSumLanes] = {};
  size_t i = 0;
  for (; i + kSumLanes <= count; i += kSumLanes) {
    for (size_t lane = 0; lane < kSumLanes; ++lane) sum[lane] += AbsValue<Format>(values[i + lane]);
  }
  for (size_t lane = 0; i + lane < count; ++lane) sum[lane] += AbsValue<Format>(values[i + lane]);
  return SumOfLanes(sum);
}

// sums[c] += sum |v[o][c]| over the next Rows rows, one after the other.
template <typename Format, size_t Rows>
inline void AddRows(const typename Format::Storage* __restrict values, size_t stride,
                    size_t channels, double* __restrict sums) {
  for (size_t c = 0; c < channels; ++c) {
    double sum = sums[c];
    for (size_t row = 0; row < Rows; ++row) sum += AbsValue<Format>(values[c + row * stride]);
    sums[c] = sum;
  }
}

template <typename Format>
void ChannelAbsSumBlock(const typename Format::Storage* __restrict values, size_t outer,
                        size_t stride, size_t channels, size_t inner, double* __restrict sums) {
  if (inner == 1) {
    // Several rows share one pass over the sums.
    size_t row = 0;
    for (; row + 8 <= outer; row += 8) {
      AddRows<Format, 8>(values + row * stride, stride, channels, sums);
    }
    for (; row < outer; ++row) AddRows<Format, 1>(values + row * stride, stride, channels, sums);
    return;
  }
  for (size_t o = 0; o < outer; ++o) {
    const typename Format::Storage* __restrict slab = values + o * stride;
    for (size_t c = 0; c < channels; ++c) sums[c] += AbsSum<Format>(slab + c * inner, inner);
  }
}

void ChannelAbsSum(DType dtype, const void* values, size_t outer, size_t stride, size_t channels,
                   size_t inner, double* sums) {
  WithFormat(dtype, [=](auto format) {
    using Format = decltype(format);
    const auto* typed = static_cast<const typename Format::Storage*>(values);
    ChannelAbsSumBlock<Format>(typed, outer, stride, channels, inner, sums);
  });
}

}  // namespace
}  // namespace hswq

#endif  // HSWQ_MONITOR_INL_
