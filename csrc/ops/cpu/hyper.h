// What the steps share on the CPU: hyper-parameters, and the guards read.
#pragma once

#include "../../core/adam.h"
#include "tensors.h"

namespace lowrank {

struct Hyper {
  double beta1, beta2, eps, weight_decay, scale = 1.0;
  AdamStep at(double step, double lr) const { return adam_step(beta1, beta2, eps, weight_decay, scale, lr, step); }
};

inline float grad_scale_of(const Guards& guards) { return guards.grad_scale ? *data<float>(*guards.grad_scale) : 1.0f; }

inline bool is_no_op(const Guards& guards) { return guards.found_inf && *data<float>(*guards.found_inf) != 0.0f; }

inline void count_skipped(const Guards& guards, int64_t skipped) {
  if (guards.skipped) *data<int64_t>(*guards.skipped) += skipped;
}

// A step's count as a number, or in a 0-dim tensor beside `model`.
inline double count_of(const char* op, int64_t step) {
  if (step < 1) fail(op, "step counts from 1, got ", step);
  return double(step);
}

inline double number_of(const char* op, const char* name, const Tensor& t, const Tensor& model) {
  expect_scalar(op, name, t, place_of(model));
  return read_number(op, name, t);
}

}  // namespace lowrank
