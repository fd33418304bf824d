// Loops over histograms: the objective of a clipping threshold, by codepoints and by bins.
#ifndef HSWQ_SEARCH_INL_
#define HSWQ_SEARCH_INL_

#include <cstring>

#include "e4m3.h"
#include "kernels.h"

namespace hswq {
namespace {

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
  // Not the other way round: NaN stays.
  return error < 0.0 ? 0.0 : error;
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
  // NaN gives 448: what is rounded below is never NaN, whose integer would be undefined.
  const double limit = !scaled && threshold < 448.0 ? threshold : 448.0;
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

}  // namespace
}  // namespace hswq

#endif  // HSWQ_SEARCH_INL_
