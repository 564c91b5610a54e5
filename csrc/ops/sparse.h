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

inline void check_grass_step(const Tensor& param, const Tensor& grad, const Tensor& indices, const std::optional<Tensor>& row_scale,
                             const Tensor& exp_avg, const Tensor& exp_avg_sq, bool left) {
  constexpr const char* op = "grass_step";
  expect_matrix(op, "param", param);
  expect_float(op, "grad", grad);
  expect_like(op, "grad", grad, param.sizes(), place_of(param));
  expect_indices(op, indices, place_of(param));
  expect_row_scale(op, "row_scale", row_scale, indices);
  const Shape shape = selected_shape(param, indices, left);
  expect_low_rank(op, "exp_avg", exp_avg, shape, place_of(param));
  expect_low_rank(op, "exp_avg_sq", exp_avg_sq, shape, place_of(param));
}

// The scale of matrix i of a list; row_scales is empty where no matrix has one.
inline std::optional<Tensor> scale_at(const Tensors& row_scales, size_t i) {
  return row_scales.empty() ? std::nullopt : std::optional<Tensor>(row_scales[i]);
}

inline void check_grass_list(const Tensors& params, const Tensors& grads, const Tensors& indices, const Tensors& row_scales,
                             const Tensors& exp_avgs, const Tensors& exp_avg_sqs, const Tensors& steps, const Tensor& lr, bool left,
                             const Guards& guards) {
  constexpr const char* op = "grass_step";
  check_length(op, "grads", grads, "params", params);
  check_length(op, "indices", indices, "params", params);
  check_length(op, "exp_avgs", exp_avgs, "params", params);
  check_length(op, "exp_avg_sqs", exp_avg_sqs, "params", params);
  check_length(op, "steps", steps, "params", params);
  if (!row_scales.empty()) check_length(op, "row_scales", row_scales, "params", params);
  check_guards(op, params, steps, lr, guards);
  for (size_t i = 0; i < params.size(); ++i)
    check_grass_step(params[i], grads[i], indices[i], scale_at(row_scales, i), exp_avgs[i], exp_avg_sqs[i], left);
}

}  // namespace lowrank
