// Back-projection into INT8 weights, tile by tile.
#pragma once

#include "../qgalore.h"
#include "int4_products.h"
#include "int8_products.h"

namespace lowrank {

// What a step reuses from matrix to matrix. `panel` holds a part of an INT4 basis, work.basis a 16-bit one in fp32.
struct Int8Workspace {
  Workspace work;
  Scratch panel;
};

// W <- decay W + alpha back(X), rounded stochastically; NaN in X leaves out its channel.
void back_project_int8_into(const Int8Matrix& w, int64_t rows, const Tensor& x, const AnyBasis& basis, bool left,
                            const Int8Step& step, Int8Workspace& work);

}  // namespace lowrank
