// The two products of a step in INT8 (core/int8_gemm.h), for any storage of the gradient, the basis and the weight.
#pragma once

#include "products.h"

namespace lowrank {

// r <- project(grad).
void project_int8_gemm(const Tensor& r, const Tensor& grad, const Tensor& basis, bool left, Workspace& work);

// param <- beta * param + alpha * back(x) where ok, which has a flag a channel (null: everywhere).
void back_project_int8_gemm(const Tensor& param, const Tensor& x, const Tensor& basis, bool left, double beta, double alpha,
                            const uint8_t* ok, const Rounding& rounding, Workspace& work);

}  // namespace lowrank
