// The two products of a step with a basis in INT4. It is unpacked panel by panel, 256 KiB a thread at a time.
#pragma once

#include "../../core/int4.h"
#include "tensors.h"

namespace lowrank {

// r <- project(grad). `tile` is for grad in another type than fp32.
void project_int4_into(const Tensor& r, const Tensor& grad, const Int4& basis, bool left, Scratch& panel, Scratch& tile);

// w <- beta * w + alpha * (the part of back(x) that begins at (row, column) and has w's shape). w is fp32, and may be a view
// with any stride between its rows; beta = 0 does not read it.
void back_project_int4_tile(const Tensor& w, int64_t row, int64_t column, const Tensor& x, const Int4& basis, bool left,
                            double beta, double alpha, Scratch& panel);

}  // namespace lowrank
