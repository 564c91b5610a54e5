// The rules of lowrank_sys/_ops/gaussian.py.
#pragma once

#include "projection.h"

namespace lowrank {

inline void expect_first(const char* op, int64_t first) {
  if (first < 0) fail(op, "first must be at least 0, got ", first);
}

inline void check_gaussian_basis(const char* op, const Tensor& out, int64_t first) {
  expect_matrix(op, "out", out);
  expect_first(op, first);
}

inline void check_gaussian_project(const char* op, const Tensor& grad, int64_t rank, int64_t first) {
  expect_matrix(op, "grad", grad);
  if (rank < 1) fail(op, "rank must be at least 1, got ", rank);
  expect_first(op, first);
}

inline void check_gaussian_back_project(const char* op, const Tensor& param, const Tensor& low_rank, bool left, int64_t first) {
  expect_matrix(op, "param", param);
  if (low_rank.dim() != 2)
    fail(op, "low_rank must be a matrix ", left ? "(r, n)" : "(m, r)", ", got shape ", tuple(low_rank.sizes()));
  const int64_t rank = low_rank.size(left ? 0 : 1);
  if (rank < 1) fail(op, "rank must be at least 1, got low_rank of shape ", tuple(low_rank.sizes()));
  const Shape shape = left ? Shape{rank, param.size(1)} : Shape{param.size(0), rank};
  expect_low_rank(op, "low_rank", low_rank, shape, place_of(param));
  expect_first(op, first);
}

}  // namespace lowrank
