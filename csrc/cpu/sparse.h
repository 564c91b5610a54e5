// Selected rows on raw pointers.
#pragma once

#include "../core/adam.h"
#include "../core/philox.h"
#include "../core/rounding.h"
#include "../core/sparse.h"
#include "matrix.h"

namespace lowrank {

// Arguments of a Grass step; `n` elements a row of w and g.
struct GrassStep {
  Matrix w, g;
  float *m, *v;
  int64_t n;
  SelectedRows rows;
  float grad_scale;
  AdamStep step;
  uint8_t* ok;  // left: one flag a column; null without weight decay
  Rounding rounding;
};

struct SparseKernels {
  // Keys of the rows [begin, end), then one call that selects.
  void (*keys)(const RowSelection&, const RandomStream&, int64_t begin, int64_t end);
  void (*select)(const RowSelection&, const RandomStream&);
  // Selected rows [begin, end), or selected columns of the rows [begin, end). x has the low-rank shape.
  void (*gather_rows)(const Matrix& g, const SelectedRows&, float* x, int64_t n, int64_t begin, int64_t end);
  void (*gather_columns)(const Matrix& g, const SelectedRows&, float* x, int64_t begin, int64_t end);
  void (*add_rows)(const Matrix& w, const SelectedRows&, const float* x, int64_t n, float alpha, int64_t begin, int64_t end);
  void (*add_columns)(const Matrix& w, const SelectedRows&, const float* x, float alpha, int64_t begin, int64_t end);
  // Columns, or rows, [begin, end); return how many channels were left out.
  int64_t (*grass_columns)(const GrassStep&, int64_t begin, int64_t end);
  int64_t (*grass_rows)(const GrassStep&, int64_t begin, int64_t end);
  // Left: weight decay of the rows [begin, end) that are not selected.
  void (*decay_rows)(const GrassStep&, int64_t begin, int64_t end);
};

const SparseKernels& sparse_kernels();

}  // namespace lowrank
