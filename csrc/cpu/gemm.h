// Thin fp32 products on raw pointers: a matrix of any storage times an fp32 basis of few columns, and back.
#pragma once

#include "matrix.h"

namespace lowrank {

// A thread takes whole multiples of these of a projection's rows or columns.
constexpr int64_t kGemmRows = 8, kGemmColumns = 16;
// Sums are made of so many products each, in order, and then added up in order. Columns of a left projection need the shorter
// ones: their rows of the gradient lie on as many pages.
constexpr int64_t kGemmDepth = 256, kGemmColumnDepth = 128;

struct Projection {
  Matrix grad;
  int64_t rows, columns;
  const float* basis;  // (columns, rank) if the product is grad basis, (rows, rank) if it is basisᵀ grad
  int64_t rank;
  float* out;
};

// w <- decay * w + alpha * a b where ok, a (rows, rank).
struct BackProjection {
  Matrix w;
  int64_t rows, columns;
  const float *a, *b;
  bool transposed;  // b is stored as (columns, rank), else (rank, columns)
  int64_t rank;
  const uint8_t *ok_rows, *ok_columns;  // may be null
  float decay, alpha;

  // The work is cut into parts: blocks of columns, as wide as b's stay in the second cache, by blocks of rows.
  static constexpr int64_t high = 64;
  int64_t wide() const {
    const int64_t share = (int64_t(1) << 16) / larger(1, rank), most = larger(1, smaller(8, share / 48)) * 48;
    const int64_t blocks = (columns + most - 1) / most;
    return (columns + blocks * kGemmColumns - 1) / (blocks * kGemmColumns) * kGemmColumns;
  }
  int64_t row_blocks() const { return (rows + high - 1) / high; }
  int64_t parts() const { return row_blocks() * ((columns + wide() - 1) / wide()); }

 private:
  static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
};

struct GemmKernels {
  bool fast;  // beats a library's on this instruction set
  // Rows [begin, end) of out (rows, rank) = grad basis.
  void (*project_rows)(const Projection&, int64_t begin, int64_t end);
  // Columns [begin, end) of out (rank, columns) = basisᵀ grad.
  void (*project_columns)(const Projection&, int64_t begin, int64_t end);
  // Parts [begin, end).
  void (*back)(const BackProjection&, int64_t begin, int64_t end);
};

const GemmKernels& gemm_kernels();

}  // namespace lowrank
