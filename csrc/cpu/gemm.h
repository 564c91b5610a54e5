// Thin fp32 products on raw pointers: a matrix times a basis of few columns.
#pragma once

#include "matrix.h"

namespace lowrank {

// A thread takes whole multiples of these of a projection's rows or columns.
constexpr int64_t kGemmRows = 8, kGemmColumns = 16;
// Sums are made of so many products each, in order, and then added up in order. Columns of a left projection need the shorter
// ones: their rows of the gradient lie on as many pages.
constexpr int64_t kGemmDepth = 256, kGemmColumnDepth = 128;

struct Projection {
  const float* grad;
  int64_t rows, columns;
  const float* basis;  // (columns, rank) if the product is grad basis, (rows, rank) if it is basisᵀ grad
  int64_t rank;
  float* out;
};

struct GemmKernels {
  bool fast;  // beats a library's on this instruction set
  // Rows [begin, end) of out (rows, rank) = grad basis.
  void (*project_rows)(const Projection&, int64_t begin, int64_t end);
  // Columns [begin, end) of out (rank, columns) = basisᵀ grad.
  void (*project_columns)(const Projection&, int64_t begin, int64_t end);
};

const GemmKernels& gemm_kernels();

}  // namespace lowrank
