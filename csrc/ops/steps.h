// The rules of lowrank_sys/_ops/steps.py.
#pragma once

#include "projection.h"

namespace lowrank {

// `low_rank_grad` is null where the gradient is the full one.
inline void check_subspace_step(const char* op, const Tensor& param, const Tensor* low_rank_grad, const Tensor& basis,
                                const Tensor& exp_avg, const Tensor& exp_avg_sq, bool left) {
  expect_matrix(op, "param", param);
  expect_basis(op, param, basis, left);
  const Shape shape = low_rank_shape(param, basis, left);
  const Place place = place_of(param);
  if (low_rank_grad != nullptr) expect_low_rank(op, "low_rank_grad", *low_rank_grad, shape, place);
  expect_low_rank(op, "exp_avg", exp_avg, shape, place);
  expect_low_rank(op, "exp_avg_sq", exp_avg_sq, shape, place);
}

inline void check_galore_step(const char* op, const Tensor& param, const Tensor& grad, const Tensor& basis, const Tensor& exp_avg,
                              const Tensor& exp_avg_sq, bool left) {
  expect_matrix(op, "param", param);
  expect_float(op, "grad", grad);
  expect_like(op, "grad", grad, param.sizes(), place_of(param));
  check_subspace_step(op, param, nullptr, basis, exp_avg, exp_avg_sq, left);
}

inline void check_adamw_step(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                             const Tensors& steps, const Tensor& lr, const Guards& guards) {
  constexpr const char* op = "adamw_step";
  check_length(op, "grads", grads, "params", params);
  check_length(op, "exp_avgs", exp_avgs, "params", params);
  check_length(op, "exp_avg_sqs", exp_avg_sqs, "params", params);
  check_length(op, "steps", steps, "params", params);
  check_guards(op, params, steps, lr, guards);
  for (size_t i = 0; i < params.size(); ++i) {
    expect_param_and_grad(op, i, params[i], grads[i]);
    const Place place = place_of(params[i]);
    const auto shape = params[i].sizes();
    expect_like(op, Item{"exp_avgs", i}, exp_avgs[i], shape, place);
    expect_dtype(op, Item{"exp_avgs", i}, exp_avgs[i], aoti_torch_dtype_float32());
    expect_like(op, Item{"exp_avg_sqs", i}, exp_avg_sqs[i], shape, place);
    expect_dtype(op, Item{"exp_avg_sqs", i}, exp_avg_sqs[i], aoti_torch_dtype_float32());
  }
}

}  // namespace lowrank
