// The rules of lowrank_sys/_ops/sparse.py.
#pragma once

#include <string>

#include "../core/sparse.h"
#include "projection.h"

namespace lowrank {

constexpr int64_t kMostRows = 1 << 24;

inline Method check_select_rows(const Tensor& norms, int64_t r, const std::string& method) {
  constexpr const char* op = "select_rows";
  if (norms.dim() != 1) fail(op, "norms must be a vector (d,), got shape ", tuple(norms.sizes()));
  expect_dtype(op, "norms", norms, aoti_torch_dtype_float32());
  expect_contiguous(op, "norms", norms);
  const int64_t d = norms.size(0);
  if (d > kMostRows) fail(op, "norms must have at most ", kMostRows, " entries, got ", d);
  if (r < 1) fail(op, "r must be at least 1, got ", r);
  if (r > d) fail(op, "r must be at most the ", d, " rows that norms has, got ", r);
  if (method == "top") return Method::top;
  if (method == "sample") return Method::sample;
  if (method == "sample_replace") return Method::sample_replace;
  fail(op, "method must be one of top, sample, sample_replace, got ", method);
}

inline void expect_indices(const char* op, const Tensor& indices, const Place& place) {
  if (indices.dim() != 1) fail(op, "indices must be a vector (r,), got shape ", tuple(indices.sizes()));
  if (indices.size(0) < 1) fail(op, "rank must be at least 1, got indices of shape ", tuple(indices.sizes()));
  expect_like(op, "indices", indices, indices.sizes(), place);
  expect_dtype(op, "indices", indices, aoti_torch_dtype_int32());
}

inline void expect_row_scale(const char* op, const char* name, const std::optional<Tensor>& scale, const Tensor& indices) {
  if (!scale) return;
  expect_like(op, name, *scale, indices.sizes(), place_of(indices));
  expect_dtype(op, name, *scale, aoti_torch_dtype_float32());
}

inline Shape selected_shape(const Tensor& matrix, const Tensor& indices, bool left) {
  if (left) return {indices.size(0), matrix.size(1)};
  return {matrix.size(0), indices.size(0)};
}

inline void check_gather_rows(const Tensor& grad, const Tensor& indices, const std::optional<Tensor>& scale) {
  constexpr const char* op = "gather_rows";
  expect_matrix(op, "grad", grad);
  expect_indices(op, indices, place_of(grad));
  expect_row_scale(op, "scale", scale, indices);
}

inline void check_scatter_add_rows(const Tensor& param, const Tensor& low_rank, const Tensor& indices,
                                   const std::optional<Tensor>& scale, bool left) {
  constexpr const char* op = "scatter_add_rows_";
  expect_matrix(op, "param", param);
  expect_indices(op, indices, place_of(param));
  expect_row_scale(op, "scale", scale, indices);
  expect_low_rank(op, "low_rank", low_rank, selected_shape(param, indices, left), place_of(param));
}

}  // namespace lowrank
