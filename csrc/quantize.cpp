#include "blocks.h"
#include "dispatch.h"
#include "ops.h"
#include "parallel.h"

namespace hswq {

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

}  // namespace hswq
