// INT8 weights on raw pointers. The unit of work is a group: group i of a tile counts along its rows.
#pragma once

#include "../core/int8.h"
#include "matrix.h"

namespace lowrank {

// rows x columns of a matrix from (row, column) on; `column` begins a group, and the tile ends with a group of its row.
struct Int8Tile {
  int64_t row, column, rows, columns;
};

struct Int8Step {
  Int8Update update;
  RandomStream stream;
  uint64_t offset;  // element (0, 0) of this matrix in the unsharded tensor
};

struct Int8Kernels {
  // Groups [begin, end) of `tile`; `dense` has the tile's shape.
  void (*quantize)(const Matrix& dense, const Int8Matrix& w, const Int8Tile& tile, int64_t begin, int64_t end);
  void (*dequantize)(const Int8Matrix& w, const Matrix& dense, const Int8Tile& tile, int64_t begin, int64_t end);
  // Returns how many groups have a new scale.
  int64_t (*update)(const Int8Matrix& w, const Matrix& dense, const Int8Tile& tile, const Int8Step& step, int64_t begin,
                    int64_t end);
  // The same with c o dense as the update: one c a row of the tile, or else a column. Where c is NaN the weight stays.
  int64_t (*update_scaled)(const Int8Matrix& w, const Matrix& dense, const float* by_row, const float* by_column,
                           const Int8Tile& tile, const Int8Step& step, int64_t begin, int64_t end);
};

const Int8Kernels& int8_kernels();

}  // namespace lowrank
