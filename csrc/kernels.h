// The C++ face of the contract: one table of function pointers, filled once per instruction set.
//
// Each function works on one block on the calling thread, allocates nothing and throws nothing.
// dispatch.cpp chooses the table; the ops (ops.h) cut the blocks and run them on threads. Pointers
// need the alignment of their element type only; inputs may alias each other, never an output.
#ifndef HSWQ_KERNELS_H_
#define HSWQ_KERNELS_H_

#include <cstddef>
#include <cstdint>

namespace hswq {

enum class DType { kFloat16, kBFloat16, kFloat32 };

// Number of distinct magnitudes of a 16-bit float, infinities and NaN included.
constexpr size_t kHalfMagnitudes = size_t{1} << 15;

// A weighted histogram made ready for the search: bin centres x_b = (b + 0.5) * width, and for each
// bin b what lies at or above it: above_mass[b] = sum H(i), above_moment[b] = sum H(i) * x_i over
// i >= b, both 0 at b == bins; power = sum H(i) * x_i^2. `terms` is workspace for padded_bins
// values, the power of two not below bins.
struct ClipHistogram {
  const double* hist;
  size_t bins;
  size_t padded_bins;
  double width;
  double power;
  double* centres;
  double* above_mass;
  double* above_moment;
  double* terms;
};

struct Kernels {
  const char* isa;

  // codes[i] = encode(clamp(w[i], -amax, amax) / scale) with IEEE float32 division. amax >= 0,
  // scale > 0, both finite; amax 0 leaves the sign bit. NaN gives 0x7F plus its sign.
  void (*quantize_e4m3)(DType dtype, const void* weights, size_t count, float amax, float scale,
                        uint8_t* codes);

  // codes[i] = table[bits of w[i]] for 16-bit floats of either kind; table holds what
  // quantize_e4m3 gives for each of the 2^16 bit patterns.
  void (*look_up_codes)(const uint16_t* weights, size_t count, const uint8_t* table,
                        uint8_t* codes);

  // values[i] = cast(decode(codes[i]) * scale), the product in float32, the cast to nearest even.
  void (*dequantize_e4m3)(const uint8_t* codes, size_t count, float scale, DType dtype,
                          void* values);

  // Returns max |w[i]|, or an Inf or NaN where the elements hold one. count 0 gives 0.
  float (*max_abs)(DType dtype, const void* weights, size_t count);

  // sums[bits of |w[i]|] += importance[i] for 16-bit floats of either kind; sums holds
  // kHalfMagnitudes values. The caller keeps the totals inside int64.
  void (*magnitude_histogram)(const uint16_t* weights, size_t count, const int64_t* importance,
                              int64_t* sums);

  // sums[b] += importance[i] with b = floor(|w[i]| / width), IEEE float32 division, at most bins
  // - 1. width >= 0; width 0 sends 0 to the first bin and all else to the last; NaN goes to the
  // first. bins <= 2^30.
  void (*bin_histogram)(DType dtype, const void* weights, size_t count, const int64_t* importance,
                        float width, size_t bins, int64_t* sums);

  // Fills centres, above_mass, above_moment and power from hist, bins and width. The sums are
  // compensated: each is good to 2 units in the last place and its products' rounding.
  void (*prepare_clip)(ClipHistogram* histogram);

  // Returns J = sum H(b) * (q(x_b) - x_b)^2, q(x) = u * round(min(x, limit) / u), from the sums
  // above: one visit per codepoint. Error at most 2^-43 * power, see search.inl.
  double (*rank_clip)(const ClipHistogram& histogram, double unit, double limit);

  // Returns J by its definition, term by term, summed by the halving tree: bit for bit what the
  // reference computes. Overwrites terms.
  double (*clip_mse)(const ClipHistogram& histogram, float amax, bool scaled);

  // sums[0] = sum v, sums[1] = sum v^2 in float64, in the order of 32 interleaved lanes.
  void (*moments)(DType dtype, const void* values, size_t count, double* sums);

  // sums[c] += sum |v| over `outer` slabs that lie `stride` elements apart, each holding `channels`
  // runs of `inner` elements; float64, slab after slab.
  void (*channel_abs_sum)(DType dtype, const void* values, size_t outer, size_t stride,
                          size_t channels, size_t inner, double* sums);
};

extern const Kernels kBaselineKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;

}  // namespace hswq

#endif  // HSWQ_KERNELS_H_
