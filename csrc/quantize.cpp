#include <algorithm>
#include <vector>

#include "blocks.h"
#include "dispatch.h"
#include "ops.h"
#include "parallel.h"

namespace hswq {
namespace {

// Rounds 16-bit weights of one amax and scale through a table of every bit pattern's code.
void QuantizeByTable(DType dtype, const uint16_t* weights, size_t count, float amax, float scale,
                     size_t threads, uint8_t* codes) {
  const Kernels& kernels = ActiveKernels();
  std::vector<uint8_t> table(2 * kHalfMagnitudes);
  {
    // Another thread would take as long to start as to help.
    const ScopedFloatEnvironment environment;
    kernels.quantize_e4m3(dtype, AllMagnitudes(), kHalfMagnitudes, amax, scale, table.data());
  }
  // A negative number has the code of its magnitude and the sign bit: of 16 bits here, of 8 there.
  std::transform(table.begin(), table.begin() + kHalfMagnitudes, table.begin() + kHalfMagnitudes,
                 [](uint8_t code) { return static_cast<uint8_t>(code | 0x80); });
  ParallelFor(BlockCount(count), threads, [&](size_t block, size_t) {
    const size_t first = block * kBlock;
    kernels.look_up_codes(weights + first, std::min(kBlock, count - first), table.data(),
                          codes + first);
  });
}

}  // namespace

void QuantizeE4m3(DType dtype, const void* weights, size_t rows, size_t row_size, const float* amax,
                  const float* scale, size_t threads, uint8_t* codes) {
  const Kernels& kernels = ActiveKernels();
  const size_t count = rows * row_size;
  // A look-up is several times quicker than the arithmetic; the table costs as much as its size.
  if (rows == 1 && dtype != DType::kFloat32 && count >= 4 * kHalfMagnitudes) {
    QuantizeByTable(dtype, static_cast<const uint16_t*>(weights), count, *amax, *scale, threads,
                    codes);
    return;
  }
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

}  // namespace hswq
