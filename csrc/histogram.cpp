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

}  // namespace

float WeightedHistogram(DType dtype, const void* weights, size_t rows, size_t row_size,
                        const int64_t* importance, size_t groups, size_t bins, size_t threads,
                        double* hist) {
  const Kernels& kernels = ActiveKernels();
  const size_t count = rows * row_size;
  const size_t blocks = BlockCount(count);
  const bool is_half = dtype != DType::kFloat32;
  const size_t table_size = is_half ? kHalfMagnitudes : bins;
  // Each worker has a table of its own; many bins leave room for fewer.
  threads = std::min(threads, std::max<size_t>(1, kTableBytes / (table_size * sizeof(int64_t))));
  const size_t workers = WorkerCount(blocks, threads);

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

}  // namespace hswq
