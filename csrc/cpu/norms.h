// Norms on raw pointers.
#pragma once

#include "matrix.h"

namespace lowrank {

struct NormKernels {
  // Rows, or columns, [begin, end) of g.
  void (*rows)(const Matrix& g, int64_t columns, float* norms, int64_t begin, int64_t end);
  void (*columns)(const Matrix& g, int64_t rows, float* norms, int64_t begin, int64_t end);
};

const NormKernels& norm_kernels();

}  // namespace lowrank
