// A stored matrix to fp32 and back.
#pragma once

#include "../core/rounding.h"
#include "matrix.h"

namespace lowrank {

struct StoreKernels {
  // Rows [begin, end) of a matrix to contiguous fp32.
  void (*widen)(const Matrix& from, float* to, int64_t columns, int64_t begin, int64_t end);
  // Rows [begin, end): w <- decay * w + alpha * update. Flags may be null; `rounding` begins at w's first element.
  void (*apply)(const Matrix& w, const float* update, const uint8_t* ok_rows, const uint8_t* ok_columns, int64_t columns,
                float decay, float alpha, const Rounding& rounding, int64_t begin, int64_t end);
  // Elements [begin, end) of w <- x.
  void (*round)(DType dtype, void* w, const float* x, const Rounding& rounding, int64_t begin, int64_t end);
};

const StoreKernels& store_kernels();

}  // namespace lowrank
