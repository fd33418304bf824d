#include <algorithm>
#include <vector>

#include "blocks.h"
#include "dispatch.h"
#include "ops.h"
#include "parallel.h"

namespace hswq {

void RoundCompensated(DType dtype, const void* weights, size_t rows, size_t columns,
                      const double* upper, const float* scale, const int64_t* order, size_t threads,
                      uint8_t* codes) {
  const Kernels& kernels = ActiveKernels();
  // Rows never meet, so their blocks may follow the number of threads.
  const size_t share = RoundUp((rows + threads - 1) / threads, kLanes<double>);
  const size_t block_rows = std::min(kRoundedRows, share);
  const size_t blocks = (rows + block_rows - 1) / block_rows;
  const size_t lines = RoundingWorkspace(std::min(block_rows, rows), columns) / kLanes<double>;
  std::vector<std::vector<CacheLine>> workspaces(WorkerCount(blocks, threads),
                                                 std::vector<CacheLine>(lines));
  ParallelFor(blocks, threads, [&](size_t block, size_t worker) {
    const size_t first = block * block_rows;
    kernels.round_compensated(dtype, Advance(weights, dtype, first * columns),
                              std::min(block_rows, rows - first), columns, upper, scale + first,
                              order, reinterpret_cast<double*>(workspaces[worker].data()),
                              codes + first * columns);
  });
}

void SweepCodes(float* slope, uint8_t* codes, const float* second, size_t columns, size_t lanes,
                const float* scale, size_t threads, float* steps) {
  const Kernels& kernels = ActiveKernels();
  const size_t blocks = (lanes + kSweptLanes - 1) / kSweptLanes;
  ParallelFor(blocks, threads, [&](size_t block, size_t) {
    const size_t first = block * kSweptLanes;
    kernels.sweep_codes(slope + first, codes + first, second, columns, lanes,
                        std::min(kSweptLanes, lanes - first), scale + first, steps + first);
  });
}

}  // namespace hswq
