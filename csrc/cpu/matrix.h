// A matrix in memory, as the CPU kernels see it.
#pragma once

#include <cstdint>

#include "../core/dtype.h"

namespace lowrank {

// Row-major memory; `stride` elements from row to row.
struct Matrix {
  DType dtype;
  void* data;
  int64_t stride;
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace lowrank
