// Every loop, written once. Included by isa_*.cpp, each compiled with its own flags.
//
// All of it is in an unnamed namespace and uses no inline function or template of the standard
// library: what the linker merges across ISA files might not run on this CPU. Built with
// -ffp-contract=off and without fast-math, all instruction sets give the same bits.

#include <cstring>

#include "e4m3.h"
#include "kernels.h"

namespace hswq {
namespace {

inline uint32_t BitsOf(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float FloatOf(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

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

inline float Magnitude(float value) { return FloatOf(BitsOf(value) & 0x7fffffff); }

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

// A float64 sum that carries the rounding errors of its additions along (Neumaier).
struct CompensatedSum {
  double sum = 0.0;
  double lost = 0.0;

  void Add(double value) {
    const double total = sum + value;
    const double kept = total - sum;
    lost += (sum - (total - kept)) + (value - kept);
    sum = total;
  }
  double Value() const { return sum + lost; }
};

void PrepareClip(ClipHistogram* histogram) {
  const size_t bins = histogram->bins;
  CompensatedSum mass;
  CompensatedSum moment;
  CompensatedSum power;
  histogram->above_mass[bins] = 0.0;
  histogram->above_moment[bins] = 0.0;
  for (size_t b = bins; b-- > 0;) {
    const double centre = (static_cast<double>(b) + 0.5) * histogram->width;
    const double weight = histogram->hist[b];
    mass.Add(weight);
    moment.Add(weight * centre);
    power.Add(weight * centre * centre);
    histogram->centres[b] = centre;
    histogram->above_mass[b] = mass.Value();
    histogram->above_moment[b] = moment.Value();
  }
  histogram->power = power.Value();
}

// With codepoint values u * m_k and boundaries M_k = u * midpoint_k between them, summation by
// parts over the codepoints gives
//   J = sum H x^2 - 2 u sum_k step_k (T1_k - M_k T0_k),
// T0_k and T1_k being the sums of H and H x over the bins with x > M_k.
//
// Error against ClipMse, in units of e = 2^-53 and power P: q <= 2 x holds everywhere, so that
// 2 u sum step T1 <= 4 P and 2 u sum step M T0 <= 4 P, all terms positive. Each goes through at
// most 28 roundings: 28 * 8 P. A bin within rounding of a boundary may be counted on its other
// side, where its error differs by at most 2 (2 x) 18 e x: 72 P. The last additions: 18 P. The
// roundings of ClipMse itself (q, the difference, its square, a tree of at most 24 levels): 48 P.
// In all 362 e P, below 2^-44 P.
double RankClip(const ClipHistogram& histogram, double unit, double limit) {
  constexpr size_t kLanes = 8;
  int32_t first[E4m3Ladder::kSize];
  double step[E4m3Ladder::kSize];
  const double ratio = unit / histogram.width;
  const auto bins = static_cast<double>(histogram.bins);
  for (size_t k = 0; k < E4m3Ladder::kSize; ++k) {
    // The first bin whose centre lies above the boundary.
    const double bin = kE4m3Ladder.midpoint[k] * ratio + 0.5;
    first[k] = static_cast<int32_t>(bin < bins ? bin : bins);
    step[k] = kE4m3Ladder.midpoint[k] * unit < limit ? kE4m3Ladder.step[k] : 0.0;
  }
  double moment[kLanes] = {};
  double mass[kLanes] = {};
  for (size_t k = 0; k < E4m3Ladder::kSize; k += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const double height = step[k + lane];
      const int32_t bin = first[k + lane];
      moment[lane] += height * histogram.above_moment[bin];
      mass[lane] += height * kE4m3Ladder.midpoint[k + lane] * histogram.above_mass[bin];
    }
  }
  for (size_t half = kLanes / 2; half > 0; half /= 2) {
    for (size_t lane = 0; lane < half; ++lane) {
      moment[lane] += moment[lane + half];
      mass[lane] += mass[lane + half];
    }
  }
  const double error = histogram.power - 2 * unit * moment[0] + 2 * unit * unit * mass[0];
  return error > 0.0 ? error : 0.0;
}

// Rounds 0 <= value <= 448 to an E4M3 magnitude: nearest, ties to the smaller.
inline double RoundTiesDown(double value) {
  constexpr uint64_t kDroppedMask = (uint64_t{1} << 49) - 1;
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits = (bits + (kDroppedMask >> 1)) & ~kDroppedMask;
  double normal;
  std::memcpy(&normal, &bits, sizeof(normal));
  const double steps = value * 512;
  const double whole = static_cast<double>(static_cast<int32_t>(steps));
  const double subnormal = (steps - whole > 0.5 ? whole + 1 : whole) * 0x1p-9;
  return value < 0x1p-6 ? subnormal : normal;
}

double ClipMse(const ClipHistogram& histogram, float amax, bool scaled) {
  const double threshold = amax;
  // With scale 1 the product and the quotient below are exact: the unscaled objective.
  const double scale = scaled ? 448.0 / threshold : 1.0;
  const double limit = scaled || threshold > 448.0 ? 448.0 : threshold;
  const double* __restrict hist = histogram.hist;
  const double* __restrict centres = histogram.centres;
  double* __restrict terms = histogram.terms;
  for (size_t b = 0; b < histogram.bins; ++b) {
    const double position = centres[b] * scale;
    const double rounded = RoundTiesDown(position < limit ? position : limit);
    const double error = rounded / scale - centres[b];
    terms[b] = hist[b] * (error * error);
  }
  for (size_t b = histogram.bins; b < histogram.padded_bins; ++b) terms[b] = 0.0;
  for (size_t half = histogram.padded_bins / 2; half > 0; half /= 2) {
    const double* __restrict upper = terms + half;
    for (size_t b = 0; b < half; ++b) terms[b] += upper[b];
  }
  return terms[0];
}

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
inline double AbsSum(const typename Format::Storage* __restrict values, size_t count) {
  double sum[kSumLanes] = {};
  const auto add = [&](size_t i, size_t lane) {
    sum[lane] += static_cast<double>(Magnitude(Format::ToFloat(values[i])));
  };
  size_t i = 0;
  for (; i + kSumLanes <= count; i += kSumLanes) {
    for (size_t lane = 0; lane < kSumLanes; ++lane) add(i + lane, lane);
  }
  for (size_t lane = 0; i + lane < count; ++lane) add(i + lane, lane);
  return SumOfLanes(sum);
}

template <typename Format>
void ChannelAbsSumBlock(const typename Format::Storage* __restrict values, size_t outer,
                        size_t stride, size_t channels, size_t inner, double* __restrict sums) {
  for (size_t o = 0; o < outer; ++o) {
    const typename Format::Storage* __restrict slab = values + o * stride;
    if (inner == 1) {
      for (size_t c = 0; c < channels; ++c) {
        sums[c] += static_cast<double>(Magnitude(Format::ToFloat(slab[c])));
      }
    } else {
      for (size_t c = 0; c < channels; ++c) sums[c] += AbsSum<Format>(slab + c * inner, inner);
    }
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

constexpr Kernels MakeKernels(const char* isa) {
  Kernels kernels{};
  kernels.isa = isa;
  kernels.quantize_e4m3 = QuantizeE4m3;
  kernels.dequantize_e4m3 = DequantizeE4m3;
  kernels.max_abs = MaxAbs;
  kernels.magnitude_histogram = MagnitudeHistogram;
  kernels.bin_histogram = BinHistogram;
  kernels.prepare_clip = PrepareClip;
  kernels.rank_clip = RankClip;
  kernels.clip_mse = ClipMse;
  kernels.moments = Moments;
  kernels.channel_abs_sum = ChannelAbsSum;
  return kernels;
}

}  // namespace
}  // namespace hswq
