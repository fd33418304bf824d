// Cutting work into blocks of fixed size, and what the work of several groups of ops needs.
#ifndef HSWQ_BLOCKS_H_
#define HSWQ_BLOCKS_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "kernels.h"

namespace hswq {

// Elements of one block: small enough for a second pass to find it in the cache, large enough for
// the work to outweigh a thread's start.
constexpr size_t kBlock = size_t{1} << 15;

// Returns the kHalfMagnitudes bit patterns of 16-bit magnitudes, in order.
inline const uint16_t* AllMagnitudes() {
  static const std::vector<uint16_t> magnitudes = [] {
    std::vector<uint16_t> all(kHalfMagnitudes);
    std::iota(all.begin(), all.end(), uint16_t{0});
    return all;
  }();
  return magnitudes.data();
}

// Storage for workspaces of any element type.
struct alignas(64) CacheLine {
  char bytes[64];
};

inline size_t BlockCount(size_t count) { return (count + kBlock - 1) / kBlock; }

inline size_t ElementSize(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Threads worth having for so many blocks of quick work: one that sleeps needs as long as several
// blocks take to wake up.
inline size_t ThreadsFor(size_t blocks, size_t threads) {
  constexpr size_t kLeastBlocks = 4;
  return std::min(threads, std::max<size_t>(1, blocks / kLeastBlocks));
}

inline const void* Advance(const void* elements, DType dtype, size_t count) {
  return static_cast<const char*>(elements) + count * ElementSize(dtype);
}

inline void* Advance(void* elements, DType dtype, size_t count) {
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

}  // namespace hswq

#endif  // HSWQ_BLOCKS_H_
