#include <algorithm>
#include <cmath>
#include <vector>

#include "blocks.h"
#include "dispatch.h"
#include "ops.h"
#include "parallel.h"

namespace hswq {
namespace {

// Sum and sum of squares of a tensor, block by block.
class MomentsWork {
 public:
  MomentsWork(DType dtype, const void* values, size_t count)
      : dtype_(dtype), values_(values), count_(count), partial_(2 * BlockCount(count)) {}

  size_t blocks() const { return BlockCount(count_); }

  void Run(size_t block) {
    const size_t first = block * kBlock;
    kernels_.moments(dtype_, Advance(values_, dtype_, first), std::min(kBlock, count_ - first),
                     partial_.data() + 2 * block);
  }

  void Finish(double* sums) const {
    const ScopedFloatEnvironment environment;
    sums[0] = static_cast<double>(count_);
    sums[1] = sums[2] = 0.0;
    for (size_t block = 0; block < blocks(); ++block) {
      sums[1] += partial_[2 * block];
      sums[2] += partial_[2 * block + 1];
    }
  }

 private:
  const Kernels& kernels_ = ActiveKernels();
  DType dtype_;
  const void* values_;
  size_t count_;
  std::vector<double> partial_;
};

// Mean magnitude per channel of [outer, channels, inner], in tiles of some slabs times some
// channels, each about one block. The sums of each row of tiles are kept apart and added in order.
class ChannelAbsWork {
 public:
  ChannelAbsWork(DType dtype, const void* values, size_t outer, size_t channels, size_t inner)
      : dtype_(dtype), values_(values), outer_(outer), channels_(channels), inner_(inner) {
    if (outer * channels * inner == 0) return;
    tile_channels_ = std::min(channels, std::max<size_t>(1, 512 / inner));
    tile_outer_ = std::min(outer, std::max<size_t>(1, kBlock / (tile_channels_ * inner)));
    columns_ = (channels + tile_channels_ - 1) / tile_channels_;
    rows_ = (outer + tile_outer_ - 1) / tile_outer_;
    partial_.resize(rows_ * channels);
  }

  size_t blocks() const { return rows_ * columns_; }

  void Run(size_t block) {
    const size_t row = block / columns_;
    const size_t o = row * tile_outer_;
    const size_t c = block % columns_ * tile_channels_;
    const size_t stride = channels_ * inner_;
    kernels_.channel_abs_sum(dtype_, Advance(values_, dtype_, o * stride + c * inner_),
                             std::min(tile_outer_, outer_ - o), stride,
                             std::min(tile_channels_, channels_ - c), inner_,
                             partial_.data() + row * channels_ + c);
  }

  // An empty tensor's means are 0 / 0.
  void Finish(double* means) const {
    const ScopedFloatEnvironment environment;
    const double count = static_cast<double>(outer_) * static_cast<double>(inner_);
    std::fill_n(means, channels_, 0.0);
    for (size_t row = 0; row < rows_; ++row) {
      const double* sums = partial_.data() + row * channels_;
      for (size_t c = 0; c < channels_; ++c) means[c] += sums[c];
    }
    for (size_t c = 0; c < channels_; ++c) means[c] /= count;
  }

 private:
  const Kernels& kernels_ = ActiveKernels();
  DType dtype_;
  const void* values_;
  size_t outer_, channels_, inner_;
  size_t tile_outer_ = 0, tile_channels_ = 0, rows_ = 0, columns_ = 0;
  std::vector<double> partial_;
};

// The fixed point of hswq/kernels/fixed_point.py, which states steps and ranges.
constexpr double kMeanLimit = 0x1p40;
constexpr double kAbsMeanLimit = 0x1p20;

// Adds value, at most kMeanLimit in magnitude, to sum[0] * 2^-8 + sum[1] * 2^-56.
void AddPair(double value, int64_t* sum) {
  const double scaled = std::fabs(value) * 0x1p8;
  const double whole = std::floor(scaled);
  const int64_t sign = value < 0.0 ? -1 : 1;
  const int64_t low = sign * static_cast<int64_t>(std::nearbyint((scaled - whole) * 0x1p48));
  // The low part of each contribution lies in [0, 2^48).
  const int64_t step = int64_t{1} << 48;
  const int64_t carry = low < 0 ? -1 : low / step;
  sum[0] += sign * static_cast<int64_t>(whole) + carry;
  sum[1] += low - carry * step;
}

}  // namespace

void Moments(DType dtype, const void* values, size_t count, size_t threads, double* sums) {
  MomentsWork work(dtype, values, count);
  ParallelFor(work.blocks(), ThreadsFor(work.blocks(), threads),
              [&](size_t block, size_t) { work.Run(block); });
  work.Finish(sums);
}

void ChannelAbsMean(DType dtype, const void* values, size_t outer, size_t channels, size_t inner,
                    size_t threads, double* means) {
  ChannelAbsWork work(dtype, values, outer, channels, inner);
  ParallelFor(work.blocks(), ThreadsFor(work.blocks(), threads),
              [&](size_t block, size_t) { work.Run(block); });
  work.Finish(means);
}

void Monitor(DType x_dtype, const void* x, size_t outer, size_t channels, size_t inner,
             DType y_dtype, const void* y, size_t y_count, bool has_abs_mean, size_t threads,
             const MonitorSums& sums, double* abs_mean) {
  ChannelAbsWork abs_work(x_dtype, x, has_abs_mean ? 0 : outer, channels, inner);
  MomentsWork moments_work(y_dtype, y, y_count);
  const size_t abs_blocks = abs_work.blocks();
  const size_t blocks = abs_blocks + moments_work.blocks();
  ParallelFor(blocks, ThreadsFor(blocks, threads), [&](size_t block, size_t) {
    if (block < abs_blocks) {
      abs_work.Run(block);
    } else {
      moments_work.Run(block - abs_blocks);
    }
  });
  if (!has_abs_mean) abs_work.Finish(abs_mean);
  double moments[3];
  moments_work.Finish(moments);

  const ScopedFloatEnvironment environment;
  const double mean = moments[1] / moments[0];
  const double mean_square = moments[2] / moments[0];
  // A comparison with NaN is false.
  const bool counted =
      std::fabs(mean) <= kMeanLimit && mean_square <= kMeanLimit &&
      std::all_of(abs_mean, abs_mean + channels, [](double m) { return m <= kAbsMeanLimit; });
  if (!counted) {
    ++*sums.skipped;
    return;
  }
  ++*sums.calls;
  AddPair(mean, sums.mean_y);
  AddPair(mean_square, sums.mean_y2);
  for (size_t c = 0; c < channels; ++c) {
    sums.abs_mean[c] += std::llrint(abs_mean[c] * 0x1p32);
  }
}

}  // namespace hswq
