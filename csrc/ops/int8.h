// The rules of lowrank_sys/_ops/int8.py.
#pragma once

#include <cmath>

#include "../core/int8.h"
#include "rules.h"

namespace lowrank {

inline void expect_int8(const char* op, const Tensor& codes, const Tensor& scale, int64_t group_size,
                        const char* scale_name = "scale") {
  expect_group_size(op, group_size);
  if (codes.dim() != 2) fail(op, "codes must be a matrix (m, n), got shape ", tuple(codes.sizes()));
  expect_dtype(op, "codes", codes, aoti_torch_dtype_int8());
  expect_contiguous(op, "codes", codes);
  const Shape shape = {codes.size(0), (codes.size(1) + group_size - 1) / group_size};
  expect_like(op, scale_name, scale, shape, place_of(codes));
  expect_dtype(op, scale_name, scale, aoti_torch_dtype_float32());
}

inline void check_quantize_int8(const Tensor& weight, int64_t group_size) {
  expect_matrix("quantize_int8", "weight", weight);
  expect_group_size("quantize_int8", group_size);
}

inline void check_dequantize_int8(const Tensor& codes, const Tensor& scale, int64_t group_size, int32_t dtype) {
  expect_int8("dequantize_int8", codes, scale, group_size);
  if (!is_float(dtype)) fail("dequantize_int8", "dtype must be float32, bfloat16 or float16, got ", dtype_name(dtype));
}

inline void check_int8_update(const Tensor& codes, const Tensor& scale, const Tensor& update, int64_t group_size) {
  constexpr const char* op = "int8_update_";
  expect_int8(op, codes, scale, group_size);
  expect_float(op, "update", update);
  expect_like(op, "update", update, codes.sizes(), place_of(codes));
}

// Where the random bits of a matrix are.
inline void expect_stream(const char* op, int64_t parameter, int64_t offset) {
  if (parameter < 0 || parameter >> 32 != 0) fail(op, "parameter must be from 0 to 2^32 - 1, got ", parameter);
  if (offset < 0) fail(op, "offset must be at least 0, got ", offset);
}

inline void check_int8_numbers(const char* op, double alpha, double decay, int64_t step) {
  if (!std::isfinite(alpha)) fail(op, "alpha must be finite, got ", alpha);
  if (!std::isfinite(decay)) fail(op, "decay must be finite, got ", decay);
  if (step < 0 || step >> 32 != 0) fail(op, "step must be from 0 to 2^32 - 1, got ", step);
}

inline void expect_rows(const char* op, const char* name, const Tensor& rows, const Tensor& codes, int64_t width,
                        const char* axis) {
  expect_float(op, name, rows);
  if (rows.dim() < 1 || rows.size(rows.dim() - 1) != width)
    fail(op, name, " must have shape (..., ", axis, " = ", width, "), got ", tuple(rows.sizes()));
  expect_on(op, name, rows, place_of(codes));
  expect_contiguous(op, name, rows);
}

inline void check_int8_linear(const Tensor& x, const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& bias,
                              int64_t group_size) {
  constexpr const char* op = "int8_linear";
  expect_int8(op, codes, scale, group_size);
  expect_rows(op, "x", x, codes, codes.size(1), "n");
  if (!bias) return;
  expect_float(op, "bias", *bias);
  expect_like(op, "bias", *bias, Shape{codes.size(0)}, place_of(codes));
}

inline void check_int8_linear_backward(const Tensor& grad_out, const Tensor& codes, const Tensor& scale, int64_t group_size) {
  expect_int8("int8_linear_backward", codes, scale, group_size);
  expect_rows("int8_linear_backward", "grad_out", grad_out, codes, codes.size(0), "m");
}

inline Int8Matrix as_int8(const Tensor& codes, const Tensor& scale, int64_t group_size) {
  return {static_cast<int8_t*>(codes.data_ptr()), static_cast<float*>(scale.data_ptr()), codes.size(1), int(group_size)};
}

}  // namespace lowrank
