// INT8 weights on raw pointers.
#pragma once

#include "../core/int8.h"
#include "coded.h"

namespace lowrank {

struct Int8Step {
  Int8Update update;
  RandomStream stream;
  uint64_t offset;  // element (0, 0) of this matrix in the unsharded tensor
};

struct Int8Kernels : CodedKernels<Int8Matrix> {
  // Groups [begin, end) of `tile`, whose shape `dense` has; returns how many groups have a new scale.
  int64_t (*update)(const Int8Matrix& w, const Matrix& dense, const CodedTile& tile, const Int8Step& step, int64_t begin,
                    int64_t end);
  // The same with c o dense as the update: one c a row of the tile, or else a column. Where c is NaN the weight stays.
  int64_t (*update_scaled)(const Int8Matrix& w, const Matrix& dense, const float* by_row, const float* by_column,
                           const CodedTile& tile, const Int8Step& step, int64_t begin, int64_t end);
};

const Int8Kernels& int8_kernels();

}  // namespace lowrank
