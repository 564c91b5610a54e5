// Weights in codes on raw pointers. The unit of work is a group: group i of a tile counts along its rows.
#pragma once

#include "../core/coded.h"
#include "matrix.h"

namespace lowrank {

// rows x columns of a matrix from (row, column) on; `column` begins a group, and the tile ends with a group of its row.
struct CodedTile {
  int64_t row, column, rows, columns;
};

// For a kind M of Coded.
template <class M>
struct CodedKernels {
  // Groups [begin, end) of `tile`; `dense` has the tile's shape.
  void (*quantize)(const Matrix& dense, const M& w, const CodedTile& tile, int64_t begin, int64_t end);
  void (*dequantize)(const M& w, const Matrix& dense, const CodedTile& tile, int64_t begin, int64_t end);
};

}  // namespace lowrank
