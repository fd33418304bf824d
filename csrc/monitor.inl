// Loops over activations: moments and channel magnitudes.
#ifndef HSWQ_MONITOR_INL_
#define HSWQ_MONITOR_INL_

#include <cstring>

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

// Two elements of a block of kSumLanes for each lane below half of that: whichever cost least.
template <typename Format>
inline void LoadPair(Format, const typename Format::Storage* __restrict block, size_t lane,
                     float* first, float* second) {
  *first = Format::ToFloat(block[lane]);
  *second = Format::ToFloat(block[lane + kSumLanes / 2]);
}

// Neighbours share a word, and each is a float32 once the other's bits are gone.
inline void LoadPair(BFloat16, const uint16_t* __restrict block, size_t lane, float* first,
                     float* second) {
  uint32_t word;
  std::memcpy(&word, block + 2 * lane, sizeof word);
  *first = FloatOf(word << 16);
  *second = FloatOf(word & 0xffff0000);
}

template <typename Format>
void MomentsBlock(const typename Format::Storage* __restrict values, size_t count,
                  double* __restrict sums) {
  double sum[kSumLanes] = {};
  double square[kSumLanes] = {};
  size_t i = 0;
  for (; i + kSumLanes <= count; i += kSumLanes) {
    PrefetchAhead(values + i);
    for (size_t lane = 0; lane < kSumLanes / 2; ++lane) {
      float first, second;
      LoadPair(Format{}, values + i, lane, &first, &second);
      const double a = first, b = second;
      sum[lane] += a;
      sum[lane + kSumLanes / 2] += b;
      square[lane] += a * a;
      square[lane + kSumLanes / 2] += b * b;
    }
  }
  for (size_t lane = 0; i + lane < count; ++lane) {
    const double value = Format::ToFloat(values[i + lane]);
    sum[lane] += value;
    square[lane] += value * value;
  }
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
    PrefetchAhead(values + i);
    for (size_t lane = 0; lane < kSumLanes / 2; ++lane) {
      float first, second;
      LoadPair(Format{}, values + i, lane, &first, &second);
      sum[lane] += static_cast<double>(Magnitude(first));
      sum[lane + kSumLanes / 2] += static_cast<double>(Magnitude(second));
    }
  }
  for (size_t lane = 0; i + lane < count; ++lane) sum[lane] += AbsValue<Format>(values[i + lane]);
  return SumOfLanes(sum);
}

// sums[c] += sum |v[o][c]| over the next Rows rows, one after the other.
template <typename Format, size_t Rows>
inline void AddRows(const typename Format::Storage* __restrict values, size_t stride,
                    size_t channels, double* __restrict sums) {
  const auto add = [&](size_t c) {
    double sum = sums[c];
    for (size_t row = 0; row < Rows; ++row) sum += AbsValue<Format>(values[c + row * stride]);
    sums[c] = sum;
  };
  size_t c = 0;
  for (; c + kSumLanes <= channels; c += kSumLanes) {
    for (size_t row = Rows; row < 2 * Rows; ++row) Prefetch(values + c + row * stride);
    for (size_t lane = 0; lane < kSumLanes; ++lane) add(c + lane);
  }
  for (; c < channels; ++c) add(c);
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
