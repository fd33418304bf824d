#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

#include "blocks.h"
#include "dispatch.h"
#include "ops.h"
#include "parallel.h"

namespace hswq {
namespace {

constexpr size_t kTableBytes = size_t{128} << 20;
constexpr size_t kTileColumns = 1024;

// Weights [rows, channels * taps] in tiles of about one block: few columns, whose importances stay
// in the first cache, and many rows.
class Tiles {
 public:
  explicit Tiles(const HistogramWeights& weights)
      : weights_(weights), row_size_(weights.channels * weights.taps) {
    const size_t rows = weights.rows;
    tile_rows_ = std::min(rows, std::max<size_t>(1, kBlock / std::min(row_size_, kTileColumns)));
    tile_columns_ = std::min(row_size_, std::max<size_t>(1, kBlock / tile_rows_));
    across_ = (row_size_ + tile_columns_ - 1) / tile_columns_;
    count_ = (rows + tile_rows_ - 1) / tile_rows_ * across_;
  }

  size_t count() const { return count_; }
  size_t row_size() const { return row_size_; }
  size_t columns() const { return tile_columns_; }

  // Calls part(values, rows, columns, importance) for the parts of a tile that belong to one group
  // each. The importances, one a column, are written to `workspace`.
  template <typename Part>
  void ForEachPart(size_t tile, int64_t* workspace, const Part& part) const {
    const size_t column = tile % across_ * tile_columns_;
    const size_t columns = std::min(tile_columns_, row_size_ - column);
    const size_t group_rows = weights_.rows / weights_.groups;
    size_t row = tile / across_ * tile_rows_;
    const size_t end = std::min(weights_.rows, row + tile_rows_);
    while (row < end) {
      const size_t group = row / group_rows;
      const size_t next = std::min(end, (group + 1) * group_rows);
      FillImportance(group, column, columns, workspace);
      part(Advance(weights_.values, weights_.dtype, row * row_size_ + column), next - row, columns,
           workspace);
      row = next;
    }
  }

 private:
  void FillImportance(size_t group, size_t column, size_t columns, int64_t* workspace) const {
    if (weights_.importance == nullptr) {
      std::fill_n(workspace, columns, int64_t{1});
      return;
    }
    const int64_t* channel =
        weights_.importance + group * weights_.channels + column / weights_.taps;
    size_t left = weights_.taps - column % weights_.taps;
    for (size_t c = 0; c < columns; ++c) {
      workspace[c] = *channel;
      if (--left > 0) continue;
      left = weights_.taps;
      ++channel;
    }
  }

  const HistogramWeights& weights_;
  size_t row_size_, tile_rows_, tile_columns_, across_, count_;
};

struct Worker {
  Worker(size_t table_size, size_t columns) : sums(table_size), importance(columns) {}

  std::vector<int64_t> sums;
  std::vector<int64_t> importance;
};

}  // namespace

float WeightedHistogram(const HistogramWeights& weights, size_t bins, size_t threads,
                        double* hist) {
  const ScopedFloatEnvironment environment;
  const Kernels& kernels = ActiveKernels();
  const Tiles tiles(weights);
  const DType dtype = weights.dtype;
  const size_t stride = tiles.row_size();
  const bool is_half = dtype != DType::kFloat32;
  const size_t table_size = is_half ? kHalfMagnitudes : bins;
  // Each worker has a table of its own; many bins leave room for fewer.
  threads = std::min(threads, std::max<size_t>(1, kTableBytes / (table_size * sizeof(int64_t))));

  std::vector<Worker> workers;
  workers.reserve(WorkerCount(tiles.count(), threads));
  while (workers.size() < workers.capacity()) workers.emplace_back(table_size, tiles.columns());
  std::vector<float> maxima(tiles.count());
  ParallelFor(tiles.count(), threads, [&](size_t tile, size_t index) {
    Worker& worker = workers[index];
    float& largest = maxima[tile];
    tiles.ForEachPart(
        tile, worker.importance.data(),
        [&](const void* values, size_t rows, size_t columns, const int64_t* importance) {
          const float found = kernels.max_abs(dtype, values, rows, stride, columns);
          // What is damaged stays.
          if (std::isfinite(largest) && !(found <= largest)) largest = found;
          if (!is_half) return;
          kernels.magnitude_histogram(static_cast<const uint16_t*>(values), rows, stride, columns,
                                      importance, worker.sums.data());
        });
  });
  if (!std::all_of(maxima.begin(), maxima.end(),
                   [](float value) { return std::isfinite(value); })) {
    std::fill_n(hist, bins, std::numeric_limits<double>::quiet_NaN());
    return std::numeric_limits<float>::quiet_NaN();
  }
  const float max_abs = *std::max_element(maxima.begin(), maxima.end());
  const auto width = static_cast<float>(static_cast<double>(max_abs) / static_cast<double>(bins));

  if (!is_half) {
    ParallelFor(tiles.count(), threads, [&](size_t tile, size_t index) {
      Worker& worker = workers[index];
      tiles.ForEachPart(
          tile, worker.importance.data(),
          [&](const void* values, size_t rows, size_t columns, const int64_t* importance) {
            kernels.bin_histogram(dtype, values, rows, stride, columns, importance, width, bins,
                                  worker.sums.data());
          });
    });
  }
  std::vector<int64_t>& sums = workers.front().sums;
  for (size_t index = 1; index < workers.size(); ++index) {
    const std::vector<int64_t>& others = workers[index].sums;
    std::transform(sums.begin(), sums.end(), others.begin(), sums.begin(), std::plus<>());
  }
  if (is_half) {
    // Every magnitude once, weighed by what was summed for it.
    static const std::vector<uint16_t> magnitudes = [] {
      std::vector<uint16_t> all(kHalfMagnitudes);
      std::iota(all.begin(), all.end(), uint16_t{0});
      return all;
    }();
    size_t used = sums.size();
    while (used > 0 && sums[used - 1] == 0) --used;
    std::vector<int64_t> binned(bins);
    kernels.bin_histogram(dtype, magnitudes.data(), 1, used, used, sums.data(), width, bins,
                          binned.data());
    sums.swap(binned);
  }
  const auto total = static_cast<double>(std::accumulate(sums.begin(), sums.end(), int64_t{0}));
  std::transform(sums.begin(), sums.end(), hist,
                 [=](int64_t sum) { return static_cast<double>(sum) / total; });
  return max_abs;
}

}  // namespace hswq
