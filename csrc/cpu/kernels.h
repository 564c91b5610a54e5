// CPU kernels on raw pointers. Each works on a part of its matrices, so that the caller can spread parts over threads.
#pragma once

#include <cstdint>

#include "../core/adam.h"
#include "../core/dtype.h"

namespace lowrank {

// Row-major memory; `stride` elements from row to row.
struct Matrix {
  DType dtype;
  void* data;
  int64_t stride;
};

struct LowRankAdam {
  const float* r;
  float *m, *v, *x;  // x may be r
  uint8_t* ok;       // one flag a channel
  int64_t rows, columns;
  float grad_scale;
  AdamStep step;
};

struct AdamW {
  DType w_dtype, g_dtype;
  void* w;
  const void* g;
  float *m, *v;
  float grad_scale;
  AdamStep step;
};

struct Kernels {
  // Columns, or rows, [begin, end) of a low-rank gradient; returns how many channels were left out.
  int64_t (*adam_columns)(const LowRankAdam&, int64_t begin, int64_t end);
  int64_t (*adam_rows)(const LowRankAdam&, int64_t begin, int64_t end);
  // Elements [begin, end); returns how many were left out.
  int64_t (*adamw)(const AdamW&, int64_t begin, int64_t end);
  // Rows, or columns, [begin, end) of g.
  void (*row_norms)(const Matrix& g, int64_t columns, float* norms, int64_t begin, int64_t end);
  void (*column_norms)(const Matrix& g, int64_t rows, float* norms, int64_t begin, int64_t end);
  // Rows [begin, end) of a matrix to contiguous fp32.
  void (*widen)(const Matrix& from, float* to, int64_t columns, int64_t begin, int64_t end);
  // Rows [begin, end): w <- decay * w + alpha * update. Flags may be null.
  void (*apply)(const Matrix& w, const float* update, const uint8_t* ok_rows, const uint8_t* ok_columns, int64_t columns,
                float decay, float alpha, int64_t begin, int64_t end);
};

// The kernels for this processor.
const Kernels& kernels();

}  // namespace lowrank
