// A stored matrix to fp32 and back.
#pragma once

#include "matrix.h"

namespace lowrank {

struct StoreKernels {
  // Rows [begin, end) of a matrix to contiguous fp32.
  void (*widen)(const Matrix& from, float* to, int64_t columns, int64_t begin, int64_t end);
  // Rows [begin, end): w <- decay * w + alpha * update. Flags may be null.
  void (*apply)(const Matrix& w, const float* update, const uint8_t* ok_rows, const uint8_t* ok_columns, int64_t columns,
                float decay, float alpha, int64_t begin, int64_t end);
};

const StoreKernels& store_kernels();

}  // namespace lowrank
