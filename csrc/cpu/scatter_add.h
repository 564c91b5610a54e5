// A product of two factors, and sparse entries behind it, on raw pointers.
#pragma once

#include "matrix.h"

namespace lowrank {

// The sparse part of a weight (m, n): so many entries in each row, in rising columns.
struct Entries {
  DType dtype;
  const void* values;
  const int32_t* columns;
  int64_t count;
};

struct ScatterAddKernels {
  // The first of the entries of rows [begin, end) that is out of place in a weight of n columns, counted from the first row's; -1
  // if there is none.
  int64_t (*misplaced)(const Entries&, int64_t n, int64_t begin, int64_t end);
  // Rows [begin, end) of a tile that begins at (row, column) of the weight: w <- scale * product + S. `product` is contiguous fp32,
  // or all of w, with a scale of 1.
  void (*merge)(const float* product, float scale, const Entries&, int64_t row, int64_t column, const Matrix& w, int64_t columns,
                int64_t begin, int64_t end);
};

const ScatterAddKernels& scatter_add_kernels();

}  // namespace lowrank
