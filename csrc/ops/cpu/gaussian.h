// Products with a Gaussian basis, of which a panel at a time is in memory.
#pragma once

#include "../../cpu/gaussian.h"
#include "products.h"

namespace lowrank {

// r <- project(grad); the projected axis begins at row `first` of the basis.
void gaussian_project_into(const Tensor& r, const Tensor& grad, const GaussianBasis& basis, int64_t first, bool left,
                           Workspace& work);

}  // namespace lowrank
