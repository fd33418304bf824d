// The inner loop of matrix products: a tile of sums that stays in registers.
#ifndef HSWQ_TILE_INL_
#define HSWQ_TILE_INL_

#include <cstddef>

#include "kernels.h"

namespace hswq {
namespace {

#if defined(__AVX512F__)
constexpr size_t kVectorBytes = 64;
#elif defined(__AVX__)
constexpr size_t kVectorBytes = 32;
#else
constexpr size_t kVectorBytes = 16;
#endif

// tile[c][lane] += lanes[k][lane] * scalars[k * stride + c] for k = 0 ... count - 1, one after the
// other, product and sum rounded separately. tile is [kTileScalars][kLanes<T>], lanes is [count]
// [kLanes<T>]; tile overlaps neither input.
//
// In vectors of the compiler's, since plain loops over a local array end up on the stack.
template <typename T>
inline void MultiplyAddTile(const T* lanes, const T* scalars, size_t stride, size_t count,
                            T* tile) {
  typedef T Vector __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
  constexpr size_t kVectors = kLanes<T> * sizeof(T) / kVectorBytes;
  // Two vectors by four scalars are what 16 registers hold.
  constexpr size_t kGroup = kVectors < 2 ? kVectors : 2;
  const auto* vectors = reinterpret_cast<const Vector*>(lanes);
  auto* result = reinterpret_cast<Vector*>(tile);
  for (size_t first = 0; first < kVectors; first += kGroup) {
    Vector sums[kTileScalars][kGroup];
    for (size_t c = 0; c < kTileScalars; ++c) {
      for (size_t v = 0; v < kGroup; ++v) sums[c][v] = result[c * kVectors + first + v];
    }
    for (size_t k = 0; k < count; ++k) {
      for (size_t c = 0; c < kTileScalars; ++c) {
        for (size_t v = 0; v < kGroup; ++v) {
          sums[c][v] += vectors[k * kVectors + first + v] * scalars[k * stride + c];
        }
      }
    }
    for (size_t c = 0; c < kTileScalars; ++c) {
      for (size_t v = 0; v < kGroup; ++v) result[c * kVectors + first + v] = sums[c][v];
    }
  }
}

}  // namespace
}  // namespace hswq

#endif  // HSWQ_TILE_INL_
