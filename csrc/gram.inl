// Products of input columns: patches laid out for vectors, and tiles of their products.
#ifndef HSWQ_GRAM_INL_
#define HSWQ_GRAM_INL_

#include "floats.inl"
#include "kernels.h"
#include "tile.inl"

namespace hswq {
namespace {

template <typename Format, typename T>
void PackWholeImages(const typename Format::Storage* __restrict x, size_t first_row, size_t rows,
                     const GramPanel& panel, T* __restrict values) {
  constexpr size_t kStrip = kLanes<T>;
  const size_t columns = panel.blocks * panel.width;
  for (size_t row = 0; row < rows; ++row) {
    const typename Format::Storage* __restrict source = x + (first_row + row) * columns;
    T* __restrict line = values + row * kStrip;
    for (size_t block = 0; block < panel.blocks; ++block, source += panel.width) {
      size_t column = 0;
      for (; column + kStrip <= panel.width; column += kStrip, line += panel.strip_size) {
        for (size_t lane = 0; lane < kStrip; ++lane) {
          line[lane] = static_cast<T>(Format::ToFloat(source[column + lane]));
        }
      }
      if (column == panel.width) continue;
      for (size_t lane = 0; lane < kStrip; ++lane) {
        line[lane] = column + lane < panel.width
                         ? static_cast<T>(Format::ToFloat(source[column + lane]))
                         : T{0};
      }
      line += panel.strip_size;
    }
  }
}

// Where an output position lies.
struct Position {
  size_t image;
  size_t y;
  size_t x;
};

// One column of patches: the values that one tap of the kernel meets at consecutive positions.
template <typename Format, typename T>
void PackTap(const typename Format::Storage* __restrict x, const Patches& patches, size_t column,
             Position position, size_t rows, T* __restrict values) {
  const size_t tap_x = column % patches.kernel[1];
  const size_t tap_y = column / patches.kernel[1] % patches.kernel[0];
  const size_t channel = column / (patches.kernel[0] * patches.kernel[1]);
  // Coordinates left of or above the image wrap to huge ones, outside it as well.
  const size_t shift_y = tap_y * patches.dilation[0] - patches.padding[0];
  const size_t shift_x = tap_x * patches.dilation[1] - patches.padding[1];
  for (size_t row = 0; row < rows;) {
    const size_t left = patches.output[1] - position.x;
    const size_t run = left < rows - row ? left : rows - row;
    const size_t y = position.y * patches.stride[0] + shift_y;
    const bool inside = y < patches.size[0];
    const typename Format::Storage* __restrict source =
        x + ((position.image * patches.channels + channel) * patches.size[0] + (inside ? y : 0)) *
                patches.size[1];
    for (size_t i = 0; i < run; ++i) {
      const size_t column_x = (position.x + i) * patches.stride[1] + shift_x;
      const bool covered = inside && column_x < patches.size[1];
      values[row + i] = covered ? static_cast<T>(Format::ToFloat(source[column_x])) : T{0};
    }
    row += run;
    position.x = 0;
    if (++position.y == patches.output[0]) {
      position.y = 0;
      ++position.image;
    }
  }
}

template <typename Format, typename T>
void PackPatches(const typename Format::Storage* __restrict x, const Patches& patches,
                 size_t first_row, size_t rows, const GramPanel& panel, T* __restrict values) {
  constexpr size_t kStrip = kLanes<T>;
  const size_t positions = patches.output[0] * patches.output[1];
  const Position position{first_row / positions, first_row % positions / patches.output[1],
                          first_row % patches.output[1]};
  // A strip's columns are first written one after the other, then interleaved.
  T taps[kStrip][kPackedRows];
  for (size_t block = 0; block < panel.blocks; ++block) {
    for (size_t first = 0; first < panel.width; first += kStrip, values += panel.strip_size) {
      for (size_t lane = 0; lane < kStrip; ++lane) {
        if (first + lane < panel.width) {
          PackTap<Format>(x, patches, block * panel.width + first + lane, position, rows,
                          taps[lane]);
        } else {
          for (size_t row = 0; row < rows; ++row) taps[lane][row] = T{0};
        }
      }
      for (size_t row = 0; row < rows; ++row) {
        for (size_t lane = 0; lane < kStrip; ++lane) values[row * kStrip + lane] = taps[lane][row];
      }
    }
  }
}

template <typename T>
void PackGramTyped(DType dtype, const void* x, const Patches& patches, size_t first_row,
                   size_t rows, const GramPanel& panel, T* values) {
  const bool whole_images = patches.padding[0] == 0 && patches.padding[1] == 0 &&
                            patches.kernel[0] == patches.size[0] &&
                            patches.kernel[1] == patches.size[1];
  WithFormat(dtype, [=](auto format) {
    using Format = decltype(format);
    const auto* typed = static_cast<const typename Format::Storage*>(x);
    if (whole_images) {
      PackWholeImages<Format>(typed, first_row, rows, panel, values);
    } else {
      PackPatches<Format>(typed, patches, first_row, rows, panel, values);
    }
  });
}

void PackGram(DType dtype, const void* x, const Patches& patches, size_t first_row, size_t rows,
              const GramPanel& panel, void* values) {
  if (panel.is_float64) {
    PackGramTyped(dtype, x, patches, first_row, rows, panel, static_cast<double*>(values));
  } else {
    PackGramTyped(dtype, x, patches, first_row, rows, panel, static_cast<float*>(values));
  }
}

// Adds the products [kLanes][kLanes] of two strips that begin with columns first_i and first_j, and
// mirrored unless the strip met itself.
template <typename T>
void AddProducts(const T* __restrict products, size_t width, size_t first_i, size_t first_j,
                 T* __restrict accumulator) {
  constexpr size_t kStrip = kLanes<T>;
  const size_t size_i = width - first_i < kStrip ? width - first_i : kStrip;
  const size_t size_j = width - first_j < kStrip ? width - first_j : kStrip;
  for (size_t i = 0; i < size_i; ++i) {
    T* __restrict row = accumulator + (first_i + i) * width + first_j;
    for (size_t j = 0; j < size_j; ++j) row[j] += products[i * kStrip + j];
  }
  if (first_i == first_j) return;
  for (size_t j = 0; j < size_j; ++j) {
    T* __restrict row = accumulator + (first_j + j) * width + first_i;
    for (size_t i = 0; i < size_i; ++i) row[i] += products[i * kStrip + j];
  }
}

template <typename T>
void AddGramTyped(const GramPanel& panel, size_t rows, size_t tile_i, size_t tile_j,
                  const T* values, T* products, T* accumulator) {
  constexpr size_t kStrip = kLanes<T>;
  constexpr size_t kStrips = kGramTile / kStrip;
  // Rows at a time, so that a strip stays in the nearest cache while its partners pass.
  constexpr size_t kDepth = 128;
  const size_t strips = (panel.width + kStrip - 1) / kStrip;
  const size_t begin_i = tile_i * kStrips;
  const size_t begin_j = tile_j * kStrips;
  const size_t end_i = strips - begin_i < kStrips ? strips : begin_i + kStrips;
  const size_t end_j = strips - begin_j < kStrips ? strips : begin_j + kStrips;
  for (size_t i = 0; i < kGramTile * kGramTile; ++i) products[i] = T{0};
  for (size_t row = 0; row < rows; row += kDepth) {
    const size_t depth = rows - row < kDepth ? rows - row : kDepth;
    for (size_t i = begin_i; i < end_i; ++i) {
      const T* scalars = values + i * panel.strip_size + row * kStrip;
      for (size_t j = begin_j > i ? begin_j : i; j < end_j; ++j) {
        const T* lanes = values + j * panel.strip_size + row * kStrip;
        T* pair = products + ((i - begin_i) * kStrips + (j - begin_j)) * kStrip * kStrip;
        for (size_t c = 0; c < kStrip; c += kTileScalars) {
          MultiplyAddTile(lanes, scalars + c, kStrip, depth, pair + c * kStrip);
        }
      }
    }
  }
  for (size_t i = begin_i; i < end_i; ++i) {
    for (size_t j = begin_j > i ? begin_j : i; j < end_j; ++j) {
      const T* pair = products + ((i - begin_i) * kStrips + (j - begin_j)) * kStrip * kStrip;
      AddProducts(pair, panel.width, i * kStrip, j * kStrip, accumulator);
    }
  }
}

void AddGram(const GramPanel& panel, size_t rows, size_t tile_i, size_t tile_j, const void* values,
             void* products, void* accumulator) {
  if (panel.is_float64) {
    AddGramTyped(panel, rows, tile_i, tile_j, static_cast<const double*>(values),
                 static_cast<double*>(products), static_cast<double*>(accumulator));
  } else {
    AddGramTyped(panel, rows, tile_i, tile_j, static_cast<const float*>(values),
                 static_cast<float*>(products), static_cast<float*>(accumulator));
  }
}

}  // namespace
}  // namespace hswq

#endif  // HSWQ_GRAM_INL_
