#include "dispatch.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "e4m3.h"
#include "parallel.h"

namespace hswq {
namespace {

// Elements of one block: small enough for a second pass to find it in the cache, large enough for
// the work to outweigh a thread's start.
constexpr size_t kBlock = size_t{1} << 15;

size_t BlockCount(size_t count) { return (count + kBlock - 1) / kBlock; }

size_t ElementSize(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

const void* Advance(const void* elements, DType dtype, size_t count) {
  return static_cast<const char*>(elements) + count * ElementSize(dtype);
}

void* Advance(void* elements, DType dtype, size_t count) {
  return static_cast<char*>(elements) + count * ElementSize(dtype);
}

// Cuts block `block` of `count` elements at the ends of rows: calls piece(begin, length, row).
template <typename Piece>
void ForEachRowPiece(size_t block, size_t count, size_t row_size, const Piece& piece) {
  const size_t end = std::min(count, (block + 1) * kBlock);
  for (size_t begin = block * kBlock; begin < end;) {
    const size_t row = begin / row_size;
    const size_t length = std::min(end, (row + 1) * row_size) - begin;
    piece(begin, length, row);
    begin += length;
  }
}

std::vector<const Kernels*> SupportedKernels() {
  std::vector<const Kernels*> kernels{&kBaselineKernels};
#ifdef HSWQ_X86
  if (__builtin_cpu_supports("avx2")) kernels.push_back(&kAvx2Kernels);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    kernels.push_back(&kAvx512Kernels);
  }
#endif
  return kernels;
}

const Kernels& ChooseKernels() {
  const std::vector<const Kernels*> supported = SupportedKernels();
  const char* forced = std::getenv("HSWQ_ISA");
  if (forced == nullptr || *forced == '\0') return *supported.back();
  std::string names;
  for (const Kernels* kernels : supported) {
    if (kernels->isa == std::string(forced)) return *kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->isa);
  }
  throw std::invalid_argument("HSWQ_ISA is '" + std::string(forced) +
                              "', but this build and CPU offer only: " + names +
                              ". Set it to one of these, or unset it.");
}

// One layer's histogram with its workspace.
class ClipSearch {
 public:
  explicit ClipSearch(size_t bins) {
    size_t padded = 1;
    while (padded < bins) padded *= 2;
    centres_.resize(bins);
    above_mass_.resize(bins + 1);
    above_moment_.resize(bins + 1);
    terms_.resize(padded);
    histogram_.bins = bins;
    histogram_.padded_bins = padded;
    histogram_.centres = centres_.data();
    histogram_.above_mass = above_mass_.data();
    histogram_.above_moment = above_moment_.data();
    histogram_.terms = terms_.data();
  }
  // Moving keeps the addresses in histogram_, copying would not.
  ClipSearch(ClipSearch&&) = default;
  ClipSearch(const ClipSearch&) = delete;

  // max_abs > 0, finite. The caller keeps `hist` alive.
  void Load(const double* hist, float max_abs, bool scaled) {
    max_abs_ = max_abs;
    scaled_ = scaled;
    histogram_.hist = hist;
    histogram_.width = max_abs_ / static_cast<double>(histogram_.bins);
    kernels_.prepare_clip(&histogram_);
  }

  double Rank(float amax) const {
    if (scaled_) {
      return kernels_.rank_clip(histogram_, amax / 448.0, std::numeric_limits<double>::infinity());
    }
    return kernels_.rank_clip(histogram_, 1.0, std::min<double>(amax, 448.0));
  }

  // Finds the candidate with the least J, the first of equals, over all stages. `amaxes` and
  // `ranks` are workspace for `count` values each.
  void Run(size_t count, size_t refinements, float* amaxes, double* ranks, float* amax,
           double* mse) {
    double low = 0.5 * max_abs_;
    double high = max_abs_;
    *amax = std::numeric_limits<float>::quiet_NaN();
    *mse = std::numeric_limits<double>::infinity();
    for (size_t stage = 0; stage <= refinements; ++stage) {
      if (stage > 0) {
        const double width = (high - low) / 4;
        low = std::max(0.1 * max_abs_, *amax - width);
        high = std::min(1.2 * max_abs_, *amax + width);
      }
      RunStage(low, high, count, amaxes, ranks, amax, mse);
    }
    // Only a histogram that holds NaN beats no candidate.
    if (!std::isfinite(*mse)) *mse = std::numeric_limits<double>::quiet_NaN();
  }

 private:
  void RunStage(double low, double high, size_t count, float* amaxes, double* ranks, float* amax,
                double* mse) {
    const double step = (high - low) / static_cast<double>(count - 1);
    for (size_t i = 0; i < count; ++i) {
      amaxes[i] = static_cast<float>(low + static_cast<double>(i) * step);
      ranks[i] = Rank(amaxes[i]);
    }
    // Two ranks may each be off by 2^-44 of the power (kernels.inl). A candidate that could still
    // win is evaluated by the definition; the rest cannot, and the outcome is that of evaluating
    // all.
    const double reach = *std::min_element(ranks, ranks + count) + 0x1p-42 * histogram_.power;
    size_t evaluated = kE4m3Magnitudes;
    for (size_t i = 0; i < count; ++i) {
      if (ranks[i] > reach) continue;
      if (!scaled_) {
        // Unscaled, thresholds that round to one codepoint have one J, and the first of them wins.
        const double* midpoints = kE4m3Ladder.midpoint;
        const auto codepoint = static_cast<size_t>(
            std::lower_bound(midpoints, midpoints + kE4m3Magnitudes - 1, amaxes[i]) - midpoints);
        if (codepoint == evaluated) continue;
        evaluated = codepoint;
      }
      const double error = kernels_.clip_mse(histogram_, amaxes[i], scaled_);
      if (error < *mse) {
        *mse = error;
        *amax = amaxes[i];
      }
    }
  }

  const Kernels& kernels_ = ActiveKernels();
  ClipHistogram histogram_{};
  std::vector<double> centres_, above_mass_, above_moment_, terms_;
  double max_abs_ = 0.0;
  bool scaled_ = false;
};

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
    for (size_t c = 0; c < channels_; ++c) {
      double sum = 0.0;
      for (size_t row = 0; row < rows_; ++row) sum += partial_[row * channels_ + c];
      means[c] = sum / count;
    }
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

std::vector<std::string> SupportedIsas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : SupportedKernels()) names.emplace_back(kernels->isa);
  return names;
}

const Kernels& ActiveKernels() {
  static const Kernels& kernels = ChooseKernels();
  return kernels;
}

void QuantizeE4m3(DType dtype, const void* weights, size_t rows, size_t row_size, const float* amax,
                  const float* scale, size_t threads, uint8_t* codes) {
  const Kernels& kernels = ActiveKernels();
  const size_t count = rows * row_size;
  ParallelFor(BlockCount(count), threads, [&](size_t block, size_t) {
    ForEachRowPiece(block, count, row_size, [&](size_t begin, size_t length, size_t row) {
      kernels.quantize_e4m3(dtype, Advance(weights, dtype, begin), length, amax[row], scale[row],
                            codes + begin);
    });
  });
}

void DequantizeE4m3(const uint8_t* codes, size_t rows, size_t row_size, const float* scale,
                    DType dtype, size_t threads, void* values) {
  const Kernels& kernels = ActiveKernels();
  const size_t count = rows * row_size;
  ParallelFor(BlockCount(count), threads, [&](size_t block, size_t) {
    ForEachRowPiece(block, count, row_size, [&](size_t begin, size_t length, size_t row) {
      kernels.dequantize_e4m3(codes + begin, length, scale[row], dtype,
                              Advance(values, dtype, begin));
    });
  });
}

float WeightedHistogram(DType dtype, const void* weights, size_t rows, size_t row_size,
                        const int64_t* importance, size_t groups, size_t bins, size_t threads,
                        double* hist) {
  const Kernels& kernels = ActiveKernels();
  const size_t count = rows * row_size;
  const size_t blocks = BlockCount(count);
  const size_t workers = WorkerCount(blocks, threads);
  const bool is_half = dtype != DType::kFloat32;

  // Without importance every element counts 1 wherever it is: each block is then one row.
  std::vector<int64_t> ones;
  size_t group_rows = rows / groups;
  if (importance == nullptr) {
    ones.assign(std::min(count, kBlock), 1);
    importance = ones.data();
    row_size = kBlock;
    group_rows = blocks;
  }
  const auto importance_at = [=](size_t row, size_t begin) {
    return importance + row / group_rows * row_size + begin % row_size;
  };

  std::vector<float> maxima(blocks);
  const size_t table_size = is_half ? kHalfMagnitudes : bins;
  std::vector<std::vector<int64_t>> tables(workers, std::vector<int64_t>(table_size));
  ParallelFor(blocks, threads, [&](size_t block, size_t worker) {
    const size_t first = block * kBlock;
    maxima[block] =
        kernels.max_abs(dtype, Advance(weights, dtype, first), std::min(kBlock, count - first));
    if (!is_half) return;
    ForEachRowPiece(block, count, row_size, [&](size_t begin, size_t length, size_t row) {
      kernels.magnitude_histogram(static_cast<const uint16_t*>(weights) + begin, length,
                                  importance_at(row, begin), tables[worker].data());
    });
  });
  if (!std::all_of(maxima.begin(), maxima.end(),
                   [](float value) { return std::isfinite(value); })) {
    std::fill_n(hist, bins, std::numeric_limits<double>::quiet_NaN());
    return std::numeric_limits<float>::quiet_NaN();
  }
  const float max_abs = *std::max_element(maxima.begin(), maxima.end());
  const ScopedFloatEnvironment environment;
  const auto width = static_cast<float>(static_cast<double>(max_abs) / static_cast<double>(bins));

  if (!is_half) {
    ParallelFor(blocks, threads, [&](size_t block, size_t worker) {
      ForEachRowPiece(block, count, row_size, [&](size_t begin, size_t length, size_t row) {
        kernels.bin_histogram(dtype, Advance(weights, dtype, begin), length,
                              importance_at(row, begin), width, bins, tables[worker].data());
      });
    });
  }
  std::vector<int64_t>& sums = tables.front();
  for (size_t worker = 1; worker < workers; ++worker) {
    std::transform(sums.begin(), sums.end(), tables[worker].begin(), sums.begin(), std::plus<>());
  }
  if (is_half) {
    // Every magnitude once, weighed by what was summed for it.
    std::vector<uint16_t> magnitudes(kHalfMagnitudes);
    std::iota(magnitudes.begin(), magnitudes.end(), uint16_t{0});
    std::vector<int64_t> binned(bins);
    kernels.bin_histogram(dtype, magnitudes.data(), magnitudes.size(), sums.data(), width, bins,
                          binned.data());
    sums.swap(binned);
  }
  const auto total = static_cast<double>(std::accumulate(sums.begin(), sums.end(), int64_t{0}));
  std::transform(sums.begin(), sums.end(), hist,
                 [=](int64_t sum) { return static_cast<double>(sum) / total; });
  return max_abs;
}

void ClipMse(const double* hist, size_t bins, float max_abs, const float* candidates, size_t count,
             bool scaled, double* mse) {
  if (!(max_abs > 0.0f)) {
    std::fill_n(mse, count, static_cast<double>(max_abs));
    return;
  }
  const ScopedFloatEnvironment environment;
  ClipSearch search(bins);
  search.Load(hist, max_abs, scaled);
  for (size_t i = 0; i < count; ++i) mse[i] = search.Rank(candidates[i]);
}

void SearchAmax(const double* hists, size_t layers, size_t bins, const float* max_abs, bool scaled,
                size_t candidates, size_t refinements, size_t threads, float* amax, double* mse) {
  struct Workspace {
    ClipSearch search;
    std::vector<float> amaxes;
    std::vector<double> ranks;
  };
  std::vector<Workspace> workspaces;
  for (size_t worker = 0; worker < WorkerCount(layers, threads); ++worker) {
    workspaces.push_back(
        {ClipSearch(bins), std::vector<float>(candidates), std::vector<double>(candidates)});
  }
  ParallelFor(layers, threads, [&](size_t layer, size_t worker) {
    if (!(max_abs[layer] > 0.0f)) {
      // 0 or NaN: there is nothing to search.
      amax[layer] = max_abs[layer];
      mse[layer] = max_abs[layer];
      return;
    }
    Workspace& workspace = workspaces[worker];
    workspace.search.Load(hists + layer * bins, max_abs[layer], scaled);
    workspace.search.Run(candidates, refinements, workspace.amaxes.data(), workspace.ranks.data(),
                         amax + layer, mse + layer);
  });
}

void Moments(DType dtype, const void* values, size_t count, size_t threads, double* sums) {
  MomentsWork work(dtype, values, count);
  ParallelFor(work.blocks(), threads, [&](size_t block, size_t) { work.Run(block); });
  work.Finish(sums);
}

void ChannelAbsMean(DType dtype, const void* values, size_t outer, size_t channels, size_t inner,
                    size_t threads, double* means) {
  ChannelAbsWork work(dtype, values, outer, channels, inner);
  ParallelFor(work.blocks(), threads, [&](size_t block, size_t) { work.Run(block); });
  work.Finish(means);
}

void Monitor(DType x_dtype, const void* x, size_t outer, size_t channels, size_t inner,
             DType y_dtype, const void* y, size_t y_count, bool has_abs_mean, size_t threads,
             const MonitorSums& sums, double* abs_mean) {
  ChannelAbsWork abs_work(x_dtype, x, outer, channels, inner);
  MomentsWork moments_work(y_dtype, y, y_count);
  const size_t abs_blocks = has_abs_mean ? 0 : abs_work.blocks();
  ParallelFor(abs_blocks + moments_work.blocks(), threads, [&](size_t block, size_t) {
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
    sums.abs_mean[c] += static_cast<int64_t>(std::nearbyint(abs_mean[c] * 0x1p32));
  }
}

}  // namespace hswq
