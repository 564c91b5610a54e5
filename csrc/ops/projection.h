// The rules of lowrank_sys/_ops/projection.py.
#pragma once

#include "rules.h"

namespace lowrank {

inline Shape low_rank_shape(const Tensor& matrix, const Tensor& basis, bool left) {
  if (left) return {basis.size(1), matrix.size(1)};
  return {matrix.size(0), basis.size(1)};
}

inline void check_project(const char* op, const Tensor& grad, const Tensor& basis, bool left) {
  expect_matrix(op, "grad", grad);
  expect_basis(op, grad, basis, left);
}

inline void expect_low_rank(const char* op, const char* name, const Tensor& t, const Shape& shape, const Place& place) {
  expect_like(op, name, t, shape, place);
  expect_dtype(op, name, t, aoti_torch_dtype_float32());
}

inline void check_back_project(const char* op, const Tensor& param, const Tensor& low_rank, const Tensor& basis, bool left) {
  expect_matrix(op, "param", param);
  expect_basis(op, param, basis, left);
  expect_low_rank(op, "low_rank", low_rank, low_rank_shape(param, basis, left), place_of(param));
}

}  // namespace lowrank
