// What the list forms of the steps make of their guards.
#pragma once

#include "../rules.h"
#include "tensors.h"

namespace lowrank {

inline float grad_scale_of(const Guards& guards) { return guards.grad_scale ? *data<float>(*guards.grad_scale) : 1.0f; }

inline bool is_no_op(const Guards& guards) { return guards.found_inf && *data<float>(*guards.found_inf) != 0.0f; }

inline void count_skipped(const Guards& guards, int64_t skipped) {
  if (guards.skipped) *data<int64_t>(*guards.skipped) += skipped;
}

}  // namespace lowrank
