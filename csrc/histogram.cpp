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
    tile_rows_ = std::min(rows, kBlock / std::min(row_size_, kTileColumns));
    tile_columns_ = std::min(row_size_, kBlock / tile_rows_);
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

// Sums by magnitude that the calling thread keeps for its next call, all zero, for as many workers:
// fresh pages would cost as much as the sums of a small weight. They are the caller's, not the
// workers': other callers have the workers as soon as this one's blocks are done.
constexpr size_t kKeptTables = 16;
std::vector<int64_t>& KeptTables() {
  thread_local std::vector<int64_t> tables;
  return tables;
}

void AddTo(int64_t* sums, const int64_t* others, size_t count) {
  std::transform(sums, sums + count, others, sums, std::plus<>());
}

// The largest of some magnitudes; NaN where one is not finite.
float Largest(const std::vector<float>& magnitudes) {
  const bool finite = std::all_of(magnitudes.begin(), magnitudes.end(),
                                  [](float value) { return std::isfinite(value); });
  return finite ? *std::max_element(magnitudes.begin(), magnitudes.end())
                : std::numeric_limits<float>::quiet_NaN();
}

// Returns how many magnitudes there are up to one of them, or all where it is not finite.
size_t MagnitudesUpTo(DType dtype, float largest) {
  const uint16_t* const all = AllMagnitudes();
  if (!std::isfinite(largest)) return kHalfMagnitudes;
  const auto exceeds = [dtype](float limit, const uint16_t& magnitude) {
    return limit < ActiveKernels().max_abs(dtype, &magnitude, 1, 1, 1);
  };
  // NaN, at the end, exceed all: a comparison with them is false.
  const uint16_t* const finite_end =
      std::lower_bound(all, all + kHalfMagnitudes, 0, [dtype](const uint16_t& magnitude, int) {
        return std::isfinite(ActiveKernels().max_abs(dtype, &magnitude, 1, 1, 1));
      });
  return static_cast<size_t>(std::upper_bound(all, finite_end, largest, exceeds) - all);
}

// Adds the sums by magnitude in the workers' tables to bins, and clears the tables. Only the first
// `used` values of a table differ from 0.
void BinMagnitudes(DType dtype, int64_t* tables, size_t workers, size_t used, float width,
                   std::vector<int64_t>* sums) {
  for (size_t worker = 1; worker < workers; ++worker) {
    int64_t* const table = tables + worker * kHalfMagnitudes;
    AddTo(tables, table, used);
    std::fill_n(table, used, int64_t{0});
  }
  // Every magnitude once, weighed by what was summed for it.
  ActiveKernels().bin_histogram(dtype, AllMagnitudes(), 1, used, used, tables, width, sums->size(),
                                sums->data());
  std::fill_n(tables, used, int64_t{0});
}

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

  const size_t workers = WorkerCount(tiles.count(), threads);
  std::vector<int64_t> importances(workers * tiles.columns());
  std::vector<int64_t> sums(bins);
  std::vector<float> maxima(tiles.count());
  // Made by the first caller, who must not meet a failure later.
  AllMagnitudes();
  std::vector<int64_t> own_tables;
  std::vector<int64_t>& tables = is_half && workers <= kKeptTables ? KeptTables() : own_tables;
  if (tables.size() < workers * table_size) tables.resize(workers * table_size);
  // All memory is there by now: what has begun must end, for it clears the tables.
  ParallelFor(tiles.count(), threads, [&](size_t tile, size_t worker) {
    int64_t* const table = &tables[worker * table_size];
    float& largest = maxima[tile];
    tiles.ForEachPart(
        tile, &importances[worker * tiles.columns()],
        [&](const void* values, size_t rows, size_t columns, const int64_t* importance) {
          const float found = kernels.max_abs(dtype, values, rows, stride, columns);
          // What is damaged stays.
          if (std::isfinite(largest) && !(found <= largest)) largest = found;
          if (!is_half) return;
          kernels.magnitude_histogram(static_cast<const uint16_t*>(values), rows, stride, columns,
                                      importance, table);
        });
  });
  const float max_abs = Largest(maxima);
  const auto width = static_cast<float>(static_cast<double>(max_abs) / static_cast<double>(bins));

  if (is_half) {
    BinMagnitudes(dtype, tables.data(), workers, MagnitudesUpTo(dtype, max_abs), width, &sums);
  } else if (std::isfinite(max_abs)) {
    ParallelFor(tiles.count(), threads, [&](size_t tile, size_t worker) {
      int64_t* const table = &tables[worker * table_size];
      tiles.ForEachPart(
          tile, &importances[worker * tiles.columns()],
          [&](const void* values, size_t rows, size_t columns, const int64_t* importance) {
            kernels.bin_histogram(dtype, values, rows, stride, columns, importance, width, bins,
                                  table);
          });
    });
    for (size_t worker = 0; worker < workers; ++worker) {
      AddTo(sums.data(), &tables[worker * table_size], bins);
    }
  }
  if (!std::isfinite(max_abs)) {
    std::fill_n(hist, bins, max_abs);
    return max_abs;
  }
  const auto total = static_cast<double>(std::accumulate(sums.begin(), sums.end(), int64_t{0}));
  std::transform(sums.begin(), sums.end(), hist,
                 [=](int64_t sum) { return static_cast<double>(sum) / total; });
  return max_abs;
}

}  // namespace hswq
