// The rules of lowrank_sys/_ops/coded.py.
#pragma once

#include "../core/int8.h"
#include "../core/nf4.h"
#include "rules.h"

namespace lowrank {

// A coding: its matrix, and the names of its ops and of their arguments.
struct Int8Coding {
  using Matrix = Int8Matrix;
  static constexpr const char *quantize = "quantize_int8", *dequantize = "dequantize_int8", *linear = "int8_linear",
                              *backward = "int8_linear_backward", *codes = "codes", *scale = "scale", *width = "n";
  static constexpr bool packed = false;
  static int32_t dtype() { return aoti_torch_dtype_int8(); }
};

struct Nf4Coding {
  using Matrix = Nf4Matrix;
  static constexpr const char *quantize = "quantize_nf4", *dequantize = "dequantize_nf4", *linear = "nf4_linear",
                              *backward = "nf4_linear_backward", *codes = "packed", *scale = "absmax", *width = "⌈n/2⌉";
  static constexpr bool packed = true;
  static int32_t dtype() { return aoti_torch_dtype_uint8(); }
};

template <class C>
Shape codes_shape(int64_t m, int64_t n) {
  return {m, (n + C::Matrix::together - 1) / C::Matrix::together};
}

inline Shape scale_shape(int64_t m, int64_t n, int64_t group_size) { return {m, (n + group_size - 1) / group_size}; }

// Returns n, which the shape of codes gives where it is not given.
template <class C>
int64_t expect_coded(const char* op, const Tensor& codes, const Tensor& scale, int64_t group_size,
                     std::optional<int64_t> given = {}, const char* scale_name = C::scale) {
  expect_group_size(op, group_size);
  if (codes.dim() != 2) fail(op, C::codes, " must be a matrix (m, ", C::width, "), got shape ", tuple(codes.sizes()));
  expect_dtype(op, C::codes, codes, C::dtype());
  const int64_t m = codes.size(0), n = given ? *given : codes.size(1);
  if (n < 0) fail(op, "n must be at least 0, got ", n);
  expect_like(op, C::codes, codes, codes_shape<C>(m, n), place_of(codes));
  expect_like(op, scale_name, scale, scale_shape(m, n, group_size), place_of(codes));
  expect_dtype(op, scale_name, scale, aoti_torch_dtype_float32());
  return n;
}

inline void expect_rows(const char* op, const char* name, const Tensor& rows, const Tensor& codes, int64_t width,
                        const char* axis) {
  expect_float(op, name, rows);
  if (rows.dim() < 1 || rows.size(rows.dim() - 1) != width)
    fail(op, name, " must have shape (..., ", axis, " = ", width, "), got ", tuple(rows.sizes()));
  expect_on(op, name, rows, place_of(codes));
  expect_contiguous(op, name, rows);
}

template <class C>
void check_quantize(const Tensor& weight, int64_t group_size) {
  expect_matrix(C::quantize, "weight", weight);
  expect_group_size(C::quantize, group_size);
}

// Returns n.
template <class C>
int64_t check_dequantize(const Tensor& codes, const Tensor& scale, std::optional<int64_t> given, int64_t group_size,
                         int32_t dtype) {
  const int64_t n = expect_coded<C>(C::dequantize, codes, scale, group_size, given);
  if (!is_float(dtype)) fail(C::dequantize, "dtype must be float32, bfloat16 or float16, got ", dtype_name(dtype));
  return n;
}

// Returns n.
template <class C>
int64_t check_linear(const Tensor& x, const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& bias,
                     int64_t group_size) {
  std::optional<int64_t> given;
  if constexpr (C::packed) {
    expect_float(C::linear, "x", x);
    if (x.dim() < 1) fail(C::linear, "x must have shape (..., n), got ", tuple(x.sizes()));
    given = x.size(x.dim() - 1);
  }
  const int64_t n = expect_coded<C>(C::linear, codes, scale, group_size, given);
  expect_rows(C::linear, "x", x, codes, n, "n");
  if (bias) {
    expect_float(C::linear, "bias", *bias);
    expect_like(C::linear, "bias", *bias, Shape{codes.size(0)}, place_of(codes));
  }
  return n;
}

// Returns n.
template <class C>
int64_t check_linear_backward(const Tensor& grad_out, const Tensor& codes, const Tensor& scale, std::optional<int64_t> given,
                              int64_t group_size) {
  const int64_t n = expect_coded<C>(C::backward, codes, scale, group_size, given);
  expect_rows(C::backward, "grad_out", grad_out, codes, codes.size(0), "m");
  return n;
}

template <class C>
typename C::Matrix as_coded(const Tensor& codes, const Tensor& scale, int64_t n, int64_t group_size) {
  return {static_cast<typename C::Matrix::Code*>(codes.data_ptr()), static_cast<float*>(scale.data_ptr()), n, int(group_size)};
}

}  // namespace lowrank
