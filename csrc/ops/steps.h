// The rules of lowrank_sys/_ops/steps.py.
#pragma once

#include "rounding.h"

namespace lowrank {

inline void check_adamw_step(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                             const Tensors& steps, const Tensor& lr, const Draws& draws, const Guards& guards) {
  constexpr const char* op = "adamw_step";
  check_length(op, "grads", grads, "params", params);
  check_length(op, "exp_avgs", exp_avgs, "params", params);
  check_length(op, "exp_avg_sqs", exp_avg_sqs, "params", params);
  check_length(op, "steps", steps, "params", params);
  check_guards(op, params, steps, lr, guards);
  draws.check_streams(op, params.size());
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
