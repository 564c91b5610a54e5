// The rules of lowrank_sys/_ops/apollo_int8.py.
#pragma once

#include "qgalore.h"
#include "residual.h"

namespace lowrank {

inline void check_apollo_int8(const Int8Weight& weight, const Tensor& grad, const Tensor& basis, const Tensor& exp_avg,
                              const Tensor& exp_avg_sq, const std::optional<Tensor>& limiter, bool left) {
  constexpr const char* op = "apollo_int8_step";
  expect_int8(op, weight.codes, weight.scale, weight.group_size, "weight_scale");
  expect_float(op, "grad", grad);
  expect_like(op, "grad", grad, weight.codes.sizes(), place_of(weight.codes));
  check_apollo_gradient(op, grad, basis, exp_avg, exp_avg_sq, limiter, left);
  expect_stream(op, weight.parameter, weight.offset);
}

}  // namespace lowrank
