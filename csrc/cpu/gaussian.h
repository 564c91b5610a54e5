// Rows of a Gaussian basis on raw pointers.
#pragma once

#include "../core/gaussian.h"
#include "matrix.h"

namespace lowrank {

struct GaussianKernels {
  // The rows of B inside [first, last) that lie in the groups [begin, end) of 64 rows; out holds rows [first, last).
  void (*rows)(const Matrix& out, const GaussianBasis& basis, int64_t first, int64_t last, int64_t begin, int64_t end);
};

const GaussianKernels& gaussian_kernels();

}  // namespace lowrank
