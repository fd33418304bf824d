#include <algorithm>
#include <vector>

#include "blocks.h"
#include "dispatch.h"
#include "ops.h"
#include "parallel.h"

namespace hswq {
namespace {

// What is above is no activation; sums of squares of the others stay far below float32's largest.
constexpr float kValueLimit = 0x1p40f;
// Rows whose products are summed from 0 before the accumulator takes them.
constexpr size_t kPanelRows = 1024;
constexpr size_t kPanelBytes = size_t{64} << 20;

bool AllWithinLimit(DType dtype, const void* x, size_t count, size_t threads) {
  const Kernels& kernels = ActiveKernels();
  std::vector<float> maxima(BlockCount(count));
  ParallelFor(maxima.size(), threads, [&](size_t block, size_t) {
    const size_t first = block * kBlock;
    maxima[block] =
        kernels.max_abs(dtype, Advance(x, dtype, first), 1, 0, std::min(kBlock, count - first));
  });
  // A comparison with NaN is false.
  return std::all_of(maxima.begin(), maxima.end(),
                     [](float value) { return value <= kValueLimit; });
}

}  // namespace

size_t Gram(DType dtype, const void* x, size_t images, Patches patches, size_t blocks,
            bool is_float64, size_t threads, void* accumulator) {
  const size_t count = images * patches.channels * patches.size[0] * patches.size[1];
  if (!AllWithinLimit(dtype, x, count, threads)) return 0;
  const Kernels& kernels = ActiveKernels();
  for (size_t axis = 0; axis < 2; ++axis) {
    const size_t span = patches.dilation[axis] * (patches.kernel[axis] - 1) + 1;
    const size_t padded = patches.size[axis] + 2 * patches.padding[axis];
    patches.output[axis] = (padded - span) / patches.stride[axis] + 1;
  }
  const size_t rows = images * patches.output[0] * patches.output[1];
  const size_t columns = patches.channels * patches.kernel[0] * patches.kernel[1];

  const size_t lanes = is_float64 ? kLanes<double> : kLanes<float>;
  const size_t width = columns / blocks;
  const size_t strips = (width + lanes - 1) / lanes;
  // One row of a panel is a cache line for each strip. The rows follow from the shape alone.
  const size_t affordable = kPanelBytes / (blocks * strips * sizeof(CacheLine));
  const size_t panel_rows = std::min({rows, kPanelRows, std::max<size_t>(1, affordable)});
  const GramPanel panel{blocks, width, panel_rows * lanes, is_float64};
  std::vector<CacheLine> values(blocks * strips * panel_rows);

  // The tiles on and above the diagonal of each block: (0, 0), (0, 1), (1, 1), (0, 2), ...
  const size_t tiles = (width + kGramTile - 1) / kGramTile;
  const size_t block_tiles = tiles * (tiles + 1) / 2;
  const size_t element_size = sizeof(CacheLine) / lanes;
  const size_t tile_lines = kGramTile * kGramTile / lanes;
  std::vector<std::vector<CacheLine>> products(WorkerCount(blocks * block_tiles, threads),
                                               std::vector<CacheLine>(tile_lines));

  for (size_t first = 0; first < rows; first += panel_rows) {
    const size_t size = std::min(panel_rows, rows - first);
    ParallelFor((size + kPackedRows - 1) / kPackedRows, threads, [&](size_t chunk, size_t) {
      const size_t row = chunk * kPackedRows;
      kernels.pack_gram(dtype, x, patches, first + row, std::min(kPackedRows, size - row), panel,
                        values.data() + row);
    });
    ParallelFor(blocks * block_tiles, threads, [&](size_t task, size_t worker) {
      const size_t block = task / block_tiles;
      size_t tile_i = task % block_tiles;
      size_t tile_j = 0;
      while (tile_i > tile_j) tile_i -= ++tile_j;
      kernels.add_gram(panel, size, tile_i, tile_j, values.data() + block * strips * panel_rows,
                       products[worker].data(),
                       static_cast<char*>(accumulator) + block * width * width * element_size);
    });
  }
  return rows;
}

}  // namespace hswq
