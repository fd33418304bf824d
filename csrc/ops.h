// The operations: each picks the kernels of this CPU, cuts its work into fixed blocks and runs them
// on threads. Results do not depend on `threads` or the instruction set. Names and meaning are
// those of hswq.kernels; inputs have been checked there. Arrays are dense and row-major.
#ifndef HSWQ_OPS_H_
#define HSWQ_OPS_H_

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace hswq {

// Asks the system to back fresh memory with huge pages: the first touch of small ones costs more
// than rounding what goes into them.
void PreferHugePages(void* begin, size_t size);

// codes[r][i] = encode(clamp(w[r][i], -amax[r], amax[r]) / scale[r]); amax and scale hold `rows`
// values. Kernels::quantize_e4m3 states the ranges.
void QuantizeE4m3(DType dtype, const void* weights, size_t rows, size_t row_size, const float* amax,
                  const float* scale, size_t threads, uint8_t* codes);

// values[r][i] = cast(decode(codes[r][i]) * scale[r]); scale holds `rows` values.
void DequantizeE4m3(const uint8_t* codes, size_t rows, size_t row_size, const float* scale,
                    DType dtype, size_t threads, void* values);

// A weight [rows, channels, taps]. importance is null (every weight counts 1) or fixed-point
// [groups, channels] for `groups` equal blocks of rows; its sums over all weights fit int64 and
// exceed 0. All sizes are at least 1.
struct HistogramWeights {
  DType dtype;
  const void* values;
  size_t rows, channels, taps;
  const int64_t* importance;
  size_t groups;
};

// Sums the importance of the weights in each of `bins` equal bins on [0, max|w|] and divides by the
// total; hist receives `bins` values, 1 <= bins <= 2^30. Returns max|w|; where weights hold NaN or
// Inf, it and hist are NaN.
float WeightedHistogram(const HistogramWeights& weights, size_t bins, size_t threads, double* hist);

// mse[i] = J(candidates[i]) by sums over codepoints, within 2^-43 * sum H x^2 of the definition.
void ClipMse(const double* hist, size_t bins, float max_abs, const float* candidates, size_t count,
             bool scaled, double* mse);

// Runs the coarse-to-fine search on each of `layers` histograms [layers, bins] with max_abs
// [layers]; fills amax and mse [layers]. candidates >= 2. A max_abs of 0 gives 0, NaN gives NaN.
void SearchAmax(const double* hists, size_t layers, size_t bins, const float* max_abs, bool scaled,
                size_t candidates, size_t refinements, size_t threads, float* amax, double* mse);

// sums receives count, sum v and sum v^2.
void Moments(DType dtype, const void* values, size_t count, size_t threads, double* sums);

// means[c] = mean |x[:, c, :]| of x [outer, channels, inner]; NaN where that is empty.
void ChannelAbsMean(DType dtype, const void* values, size_t outer, size_t channels, size_t inner,
                    size_t threads, double* means);

// The accumulators of hswq.kernels.MonitorAccumulators: one value each, two, two, and one a
// channel.
struct MonitorSums {
  int64_t* calls;
  int64_t* skipped;
  int64_t* mean_y;
  int64_t* mean_y2;
  int64_t* abs_mean;
};

// Reduces x [outer, channels, inner] to abs_mean [channels], unless abs_mean is given already, and
// y to its mean and mean square, and adds all three to the accumulators in fixed point. A call with
// a value that is not finite or out of range only adds 1 to skipped.
void Monitor(DType x_dtype, const void* x, size_t outer, size_t channels, size_t inner,
             DType y_dtype, const void* y, size_t y_count, bool has_abs_mean, size_t threads,
             const MonitorSums& sums, double* abs_mean);

// Adds the products of the columns of patches to accumulator [blocks, n / blocks, n / blocks],
// float64 or float32, n = channels * kernel[0] * kernel[1]; both triangles. x is [images, channels,
// size[0], size[1]]; patches.output is not read. Returns the number of patches, or 0 where x holds
// a value that is not finite or above 2^40, and then adds nothing.
size_t Gram(DType dtype, const void* x, size_t images, Patches patches, size_t blocks,
            bool is_float64, size_t threads, void* accumulator);

// Rounds weights [rows, columns] column by column in the given order; upper is [columns, columns],
// scale [rows], order [columns].
void RoundCompensated(DType dtype, const void* weights, size_t rows, size_t columns,
                      const double* upper, const float* scale, const int64_t* order, size_t threads,
                      uint8_t* codes);

// Chooses the codes [columns, lanes] anew, columns <= kSweptColumns, one column after the other;
// slope [columns, lanes] follows, second is [columns, columns], scale [lanes], steps as codes.
void SweepCodes(float* slope, uint8_t* codes, const float* second, size_t columns, size_t lanes,
                const float* scale, size_t threads, float* steps);

}  // namespace hswq

#endif  // HSWQ_OPS_H_
