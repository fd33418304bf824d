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

// Elements of T in one cache line: what the kernels of matrix products process together.
template <typename T>
constexpr size_t kLanes = 64 / sizeof(T);
// Their tile of sums is this many scalars by kLanes.
constexpr size_t kTileScalars = 4;

static constexpr size_t RoundUp(size_t count, size_t step) {
  return (count + step - 1) / step * step;
}

// Compensated rounding takes at most so many rows at once, and their columns in blocks of this
// size.
constexpr size_t kRoundedRows = 64;
constexpr size_t kRoundedColumns = 128;

// Float64 values that it needs as workspace: the rows, the errors of one block of columns and a
// square of the factor. A whole number of cache lines.
static constexpr size_t RoundingWorkspace(size_t rows, size_t columns) {
  return RoundUp(rows, kLanes<double>) * (RoundUp(columns, kTileScalars) + kRoundedColumns) +
         kRoundedColumns * kRoundedColumns;
}

// A sweep takes at most so many columns, and its rows by so many: 16 KB of slopes.
constexpr size_t kSweptColumns = 64;
constexpr size_t kSweptLanes = 64;

// The patches of images [channels, size[0], size[1]]: one row of columns (channel, kernel[0],
// kernel[1]) for each of output[0] * output[1] positions. The input of a Linear is images of one
// element with a kernel of one.
struct Patches {
  size_t channels;
  size_t size[2];
  size_t kernel[2];
  size_t stride[2];
  size_t padding[2];
  size_t dilation[2];
  size_t output[2];
};

// Some rows of patches in float32 or float64. Each of `blocks` blocks of `width` columns is cut
// into strips of kLanes columns, the last padded with zeros; strip s of all blocks begins at
// s * strip_size elements and holds kLanes elements a row.
struct GramPanel {
  size_t blocks;
  size_t width;
  size_t strip_size;
  bool is_float64;
};

// Most rows of one call that packs them.
constexpr size_t kPackedRows = 32;
// Columns on each side of the square of products that one call adds.
constexpr size_t kGramTile = 128;

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

  // Returns the largest |w| of [rows, columns], whose rows are `stride` apart, or an Inf or NaN
  // where the elements hold one; 0 if there are none.
  float (*max_abs)(DType dtype, const void* weights, size_t rows, size_t stride, size_t columns);

  // sums[bits of |w[row][c]|] += importance[c] for 16-bit floats of either kind; sums holds
  // kHalfMagnitudes values. The caller keeps the totals inside int64.
  void (*magnitude_histogram)(const uint16_t* weights, size_t rows, size_t stride, size_t columns,
                              const int64_t* importance, int64_t* sums);

  // sums[b] += importance[c] with b = floor(|w[row][c]| / width), IEEE float32 division, at most
  // bins - 1. width >= 0; width 0 sends 0 to the first bin and all else to the last; NaN goes to
  // the first. bins <= 2^30.
  void (*bin_histogram)(DType dtype, const void* weights, size_t rows, size_t stride,
                        size_t columns, const int64_t* importance, float width, size_t bins,
                        int64_t* sums);

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

  // Rounds `rows` <= kRoundedRows rows of a weight [rows, columns] to codepoints as
  // hswq.kernels.round_compensated defines; upper is [columns, columns] without its lower triangle,
  // scale [rows], order [columns]. workspace holds RoundingWorkspace(rows, columns) values, best
  // aligned to a cache line.
  void (*round_compensated)(DType dtype, const void* weights, size_t rows, size_t columns,
                            const double* upper, const float* scale, const int64_t* order,
                            double* workspace, uint8_t* codes);

  // Chooses the codes of `columns` <= kSweptColumns columns of a weight anew for `lanes` <=
  // kSweptLanes of its rows, as hswq.kernels.sweep_codes defines. Value (k, lane) of slope, codes
  // and steps lies at [k * stride + lane]; second is [columns, columns], scale [lanes].
  void (*sweep_codes)(float* slope, uint8_t* codes, const float* second, size_t columns,
                      size_t stride, size_t lanes, const float* scale, float* steps);

  // Writes rows first_row ... first_row + rows - 1 of the patches of x, rows <= kPackedRows, to a
  // panel; `values` is the place of the first of them in the panel's first strip.
  void (*pack_gram)(DType dtype, const void* x, const Patches& patches, size_t first_row,
                    size_t rows, const GramPanel& panel, void* values);

  // accumulator[i][j] += sum over `rows` rows of v_i * v_j for the columns i of tile tile_i and j
  // of tile tile_j >= tile_i of one block, and the same for (j, i). The sum begins with 0 and goes
  // row by row; products and sums are rounded separately, in the panel's dtype. `values` is the
  // block's first strip, accumulator [width, width] the block's. products is workspace for
  // kGramTile * kGramTile elements; best aligned to a cache line, as values are.
  void (*add_gram)(const GramPanel& panel, size_t rows, size_t tile_i, size_t tile_j,
                   const void* values, void* products, void* accumulator);
};

extern const Kernels kBaselineKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;

}  // namespace hswq

#endif  // HSWQ_KERNELS_H_
