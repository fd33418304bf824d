// Error-compensated rounding of some rows: columns in blocks, the columns to come by tiles.
#ifndef HSWQ_ROUNDING_INL_
#define HSWQ_ROUNDING_INL_

#include "e4m3.h"
#include "floats.inl"
#include "kernels.h"
#include "tile.inl"

namespace hswq {
namespace {

// Rows share a vector: value (r, k) lies at [r / kRowLanes][k][r % kRowLanes].
constexpr size_t kRowLanes = kLanes<double>;

template <typename Format>
void GatherRows(const typename Format::Storage* __restrict weights, size_t rows, size_t columns,
                const int64_t* __restrict order, double* __restrict values) {
  const size_t padded = RoundUp(columns, kTileScalars);
  for (size_t first = 0; first < rows; first += kRowLanes) {
    const size_t lanes = rows - first < kRowLanes ? rows - first : kRowLanes;
    const typename Format::Storage* __restrict source = weights + first * columns;
    double* __restrict strip = values + first * padded;
    for (size_t k = 0; k < padded; ++k) {
      for (size_t lane = 0; lane < kRowLanes; ++lane) {
        const bool exists = k < columns && lane < lanes;
        const auto column = exists ? static_cast<size_t>(order[k]) : 0;
        strip[k * kRowLanes + lane] =
            exists ? static_cast<double>(Format::ToFloat(source[lane * columns + column])) : 0.0;
      }
    }
  }
}

// packed[t][k][c] = upper[first_row + k][first_column + t * kTileScalars + c], 0 beyond its edge.
void PackUpper(const double* __restrict upper, size_t columns, size_t first_row, size_t rows,
               size_t first_column, size_t width, double* __restrict packed) {
  for (size_t k = 0; k < rows; ++k) {
    const double* __restrict row = upper + (first_row + k) * columns + first_column;
    for (size_t l = 0; l < width; l += kTileScalars) {
      double* __restrict entries = packed + l * rows + k * kTileScalars;
      for (size_t c = 0; c < kTileScalars; ++c) entries[c] = l + c < width ? row[l + c] : 0.0;
    }
  }
}

// Rounds one column of one strip: the codes, and the errors with the sign they are added with.
inline void RoundLanes(const double* __restrict values, const float* __restrict scale,
                       double diagonal, double* __restrict errors, uint32_t* __restrict codes) {
  for (size_t lane = 0; lane < kRowLanes; ++lane) {
    const double value = values[lane];
    const uint32_t code = EncodeE4m3(BitsOf(static_cast<float>(value) / scale[lane]));
    const auto rounded = static_cast<double>(FloatOf(DecodeE4m3(code)) * scale[lane]);
    // -e: v - e * U and v + (-e) * U have the same bits.
    errors[lane] = -((value - rounded) / diagonal);
    codes[lane] = code;
  }
}

inline void AddLanes(const double* __restrict errors, double coefficient,
                     double* __restrict values) {
  for (size_t lane = 0; lane < kRowLanes; ++lane) values[lane] += errors[lane] * coefficient;
}

void RoundCompensated(DType dtype, const void* weights, size_t rows, size_t columns,
                      const double* upper, const float* scale, const int64_t* order,
                      double* workspace, uint8_t* codes) {
  const size_t padded = RoundUp(columns, kTileScalars);
  const size_t padded_rows = RoundUp(rows, kRowLanes);
  double* values = workspace;
  double* errors = values + padded_rows * padded;
  double* packed = errors + padded_rows * kRoundedColumns;
  float scales[kRoundedRows];
  for (size_t row = 0; row < padded_rows; ++row) scales[row] = row < rows ? scale[row] : 1.0f;
  WithFormat(dtype, [=](auto format) {
    using Format = decltype(format);
    GatherRows<Format>(static_cast<const typename Format::Storage*>(weights), rows, columns, order,
                       values);
  });

  for (size_t begin = 0; begin < columns; begin += kRoundedColumns) {
    const size_t size = columns - begin < kRoundedColumns ? columns - begin : kRoundedColumns;
    PackUpper(upper, columns, begin, size, begin, size, packed);
    for (size_t tile = 0; tile < size; tile += kTileScalars) {
      const size_t tile_end = size - tile < kTileScalars ? size : tile + kTileScalars;
      const double* entries = packed + tile * size;
      // The errors of the block's columns before the tile, then, column by column, those within it.
      for (size_t row = 0; row < padded_rows; row += kRowLanes) {
        MultiplyAddTile(errors + row * kRoundedColumns, entries, kTileScalars, tile,
                        values + row * padded + (begin + tile) * kRowLanes);
      }
      for (size_t k = tile; k < tile_end; ++k) {
        const double* coefficients = entries + k * kTileScalars;
        const auto column = static_cast<size_t>(order[begin + k]);
        for (size_t row = 0; row < padded_rows; row += kRowLanes) {
          double* strip = values + row * padded + begin * kRowLanes;
          double* error = errors + row * kRoundedColumns + k * kRowLanes;
          uint32_t chosen[kRowLanes];
          RoundLanes(strip + k * kRowLanes, scales + row, coefficients[k - tile], error, chosen);
          for (size_t l = k + 1; l < tile_end; ++l) {
            AddLanes(error, coefficients[l - tile], strip + l * kRowLanes);
          }
          for (size_t lane = 0; lane < kRowLanes && row + lane < rows; ++lane) {
            codes[(row + lane) * columns + column] = static_cast<uint8_t>(chosen[lane]);
          }
        }
      }
    }
    for (size_t first = begin + size; first < columns; first += kRoundedColumns) {
      const size_t width = columns - first < kRoundedColumns ? columns - first : kRoundedColumns;
      PackUpper(upper, columns, begin, size, first, width, packed);
      for (size_t row = 0; row < padded_rows; row += kRowLanes) {
        double* strip = values + row * padded + first * kRowLanes;
        for (size_t tile = 0; tile < width; tile += kTileScalars) {
          MultiplyAddTile(errors + row * kRoundedColumns, packed + tile * size, kTileScalars, size,
                          strip + tile * kRowLanes);
        }
      }
    }
  }
}

void SweepCodes(float* slope, uint8_t* codes, const float* second, size_t columns, size_t stride,
                size_t lanes, const float* scale, float* steps) {
  // Rows of the whole matrix may lie a power of two apart, where a cache holds few of them.
  alignas(64) float slopes[kSweptColumns][kSweptLanes];
  alignas(64) float step[kSweptLanes];
  float scales[kSweptLanes];
  for (size_t lane = 0; lane < kSweptLanes; ++lane) {
    scales[lane] = lane < lanes ? scale[lane] : 1.0f;
  }
  for (size_t k = 0; k < columns; ++k) {
    for (size_t lane = 0; lane < kSweptLanes; ++lane) {
      slopes[k][lane] = lane < lanes ? slope[k * stride + lane] : 0.0f;
    }
  }
  for (size_t k = 0; k < columns; ++k) {
    const float* __restrict row = second + k * columns;
    uint8_t* __restrict code = codes + k * stride;
    uint32_t chosen[kSweptLanes];
    for (size_t lane = 0; lane < kSweptLanes; ++lane) {
      chosen[lane] = lane < lanes ? code[lane] : 0;
    }
    for (size_t lane = 0; lane < kSweptLanes; ++lane) {
      const float value = FloatOf(DecodeE4m3(chosen[lane])) * scales[lane];
      const float best = value + slopes[k][lane] / row[k];
      const uint32_t nearest = EncodeE4m3(BitsOf(best / scales[lane]));
      const float other = FloatOf(DecodeE4m3(nearest)) * scales[lane];
      const bool nearer = Magnitude(other - best) < Magnitude(value - best);
      step[lane] = nearer ? other - value : 0.0f;
      chosen[lane] = nearer ? nearest : chosen[lane];
    }
    for (size_t l = 0; l < columns; ++l) {
      const float coefficient = row[l];
      for (size_t lane = 0; lane < kSweptLanes; ++lane) {
        slopes[l][lane] -= coefficient * step[lane];
      }
    }
    for (size_t lane = 0; lane < lanes; ++lane) {
      code[lane] = static_cast<uint8_t>(chosen[lane]);
      steps[k * stride + lane] = step[lane];
    }
  }
  for (size_t k = 0; k < columns; ++k) {
    for (size_t lane = 0; lane < lanes; ++lane) slope[k * stride + lane] = slopes[k][lane];
  }
}

}  // namespace
}  // namespace hswq

#endif  // HSWQ_ROUNDING_INL_
