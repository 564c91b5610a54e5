// The two products of a step, for any storage.
#pragma once

#include "tensors.h"

namespace lowrank {

// What a step reuses from matrix to matrix.
struct Workspace {
  Scratch low_rank, basis, tile;
};

// r <- project(grad); basis in fp32.
void project_into(const Tensor& r, const Tensor& grad, const Tensor& basis, bool left, Scratch& scratch);

// param <- beta * param + alpha * back(x) where ok, which has a flag a channel (null: everywhere); basis in fp32.
void back_project_into(const Tensor& param, const Tensor& x, const Tensor& basis, bool left, double beta, double alpha,
                       const uint8_t* ok, Scratch& scratch);

}  // namespace lowrank
