// What the steps share on the CPU: hyper-parameters, and the guards read.
#pragma once

#include "../../core/adam.h"
#include "../rounding.h"
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

// How weight i of a step is rounded, at its count.
inline Rounding rounding_of(const Draws& draws, size_t i, double count) {
  if (!draws.stochastic) return {};
  return {true, {uint64_t(draws.seed), counter_step(count), uint32_t(draws.parameter(i))}, uint64_t(draws.offset(i))};
}

// The count of a step: a counter that advances first, or a number.
inline double count_of(const Tensor& step, bool advance) {
  return advance ? double(*data<float>(step) += 1.0f) : read_number(step);
}

}  // namespace lowrank
