// The rules of lowrank_sys/_ops/residual.py.
#pragma once

#include "gaussian.h"
#include "steps.h"

namespace lowrank {

inline bool is_key(const Tensor& basis) { return dtype_of(basis) == aoti_torch_dtype_int64(); }

inline void check_gradient(const char* op, const Tensor& param, const Tensor& grad) {
  expect_matrix(op, "param", param);
  expect_float(op, "grad", grad);
  expect_like(op, "grad", grad, param.sizes(), place_of(param));
}

inline void check_limiter(const char* op, const Tensor& param, const std::optional<Tensor>& limiter) {
  if (!limiter) return;
  expect_scalar(op, "limiter", *limiter, place_of(param), true);
  expect_dtype(op, "limiter", *limiter, aoti_torch_dtype_float32());
}

// The moments of a step with the basis of a key, for a matrix of grad's shape.
inline void check_key_step(const char* op, const Tensor& grad, const Tensor& key, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                           bool left) {
  const Place place = place_of(grad);
  expect_like(op, "basis", key, Shape{4}, place);
  if (key.is_cpu()) expect_first(op, static_cast<const int64_t*>(key.data_ptr())[3]);
  if (exp_avg.dim() != 2) fail(op, "exp_avg must be a matrix ", left ? "(r, n)" : "(m, r)", ", got shape ", tuple(exp_avg.sizes()));
  const int64_t rank = exp_avg.size(left ? 0 : 1);
  if (rank < 1) fail(op, "rank must be at least 1, got exp_avg of shape ", tuple(exp_avg.sizes()));
  const Shape shape = left ? Shape{rank, grad.size(1)} : Shape{grad.size(0), rank};
  expect_low_rank(op, "exp_avg", exp_avg, shape, place);
  expect_low_rank(op, "exp_avg_sq", exp_avg_sq, shape, place);
}

// The rules of APOLLO but those of the weight, whose shape and device the gradient has.
inline void check_apollo_gradient(const char* op, const Tensor& grad, const Tensor& basis, const Tensor& exp_avg,
                                  const Tensor& exp_avg_sq, const std::optional<Tensor>& limiter, bool left) {
  if (is_key(basis)) {
    check_key_step(op, grad, basis, exp_avg, exp_avg_sq, left);
  } else {
    expect_basis(op, grad, basis, left);
    const Shape shape = low_rank_shape(grad, basis, left);
    expect_low_rank(op, "exp_avg", exp_avg, shape, place_of(grad));
    expect_low_rank(op, "exp_avg_sq", exp_avg_sq, shape, place_of(grad));
  }
  check_limiter(op, grad, limiter);
}

inline void check_apollo_step(const Tensor& param, const Tensor& grad, const Tensor& basis, const Tensor& exp_avg,
                              const Tensor& exp_avg_sq, const std::optional<Tensor>& limiter, bool left) {
  constexpr const char* op = "apollo_step";
  check_gradient(op, param, grad);
  check_apollo_gradient(op, grad, basis, exp_avg, exp_avg_sq, limiter, left);
}

inline void check_fira_step(const Tensor& param, const Tensor& grad, const Tensor& basis, const Tensor& exp_avg,
                            const Tensor& exp_avg_sq, const std::optional<Tensor>& limiter, const std::optional<Tensor>& gram,
                            bool left) {
  constexpr const char* op = "fira_step";
  check_galore_step(op, param, grad, basis, exp_avg, exp_avg_sq, left);
  check_limiter(op, param, limiter);
  if (gram) expect_low_rank(op, "gram", *gram, Shape{basis.size(1), basis.size(1)}, place_of(param));
}

}  // namespace lowrank
