// The second half of a step, tile by tile: W <- decay W + alpha (back(X) + c o phi).
#pragma once

#include "int8_products.h"
#include "products.h"

namespace lowrank {

struct Update {
  bool left;
  float decay, alpha;
  const Basis* basis = nullptr;
  const Tensor* x = nullptr;            // null: no back(X); NaN in channels that are left out, or `ok` has 0 there
  const uint8_t* ok = nullptr;          // a flag a channel, or null: all are usable
  const Tensor* gradient = nullptr;     // null: no phi
  const Tensor* inside = nullptr;       // R, where phi is the sign of G - back(R); else it is G
  const float* coefficients = nullptr;  // c, one a channel where there is a phi; NaN leaves it out
};

void apply_into(const Tensor& param, const Update& u, const Rounding& rounding, Workspace& work);

// Rounded stochastically, with the bits of `stream` from element `offset` on.
void apply_int8_into(const Int8Matrix& w, int64_t rows, const Update& u, const RandomStream& stream, uint64_t offset,
                     Workspace& work);

}  // namespace lowrank
