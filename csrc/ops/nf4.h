// The rules of lowrank_sys/_ops/nf4.py.
#pragma once

#include "../core/nf4.h"
#include "rules.h"

namespace lowrank {

// A weight (m, n) in NF4.
inline void expect_nf4(const char* op, const Tensor& packed, const Tensor& absmax, int64_t n, int64_t group_size) {
  expect_group_size(op, group_size);
  if (packed.dim() != 2) fail(op, "packed must be a matrix (m, ⌈n/2⌉), got shape ", tuple(packed.sizes()));
  expect_dtype(op, "packed", packed, aoti_torch_dtype_uint8());
  if (n < 0) fail(op, "n must be at least 0, got ", n);
  expect_like(op, "packed", packed, Shape{packed.size(0), (n + 1) / 2}, place_of(packed));
  expect_like(op, "absmax", absmax, Shape{packed.size(0), (n + group_size - 1) / group_size}, place_of(packed));
  expect_dtype(op, "absmax", absmax, aoti_torch_dtype_float32());
}

inline void check_quantize_nf4(const Tensor& weight, int64_t group_size) {
  expect_matrix("quantize_nf4", "weight", weight);
  expect_group_size("quantize_nf4", group_size);
}

inline void check_dequantize_nf4(const Tensor& packed, const Tensor& absmax, int64_t n, int64_t group_size, int32_t dtype) {
  expect_nf4("dequantize_nf4", packed, absmax, n, group_size);
  if (!is_float(dtype)) fail("dequantize_nf4", "dtype must be float32, bfloat16 or float16, got ", dtype_name(dtype));
}

inline void check_nf4_linear(const Tensor& x, const Tensor& packed, const Tensor& absmax, const std::optional<Tensor>& bias,
                             int64_t group_size) {
  constexpr const char* op = "nf4_linear";
  expect_float(op, "x", x);
  if (x.dim() < 1) fail(op, "x must have shape (..., n), got ", tuple(x.sizes()));
  expect_nf4(op, packed, absmax, x.size(x.dim() - 1), group_size);
  expect_on(op, "x", x, place_of(packed));
  expect_contiguous(op, "x", x);
  if (!bias) return;
  expect_float(op, "bias", *bias);
  expect_like(op, "bias", *bias, Shape{packed.size(0)}, place_of(packed));
}

inline void check_nf4_linear_backward(const Tensor& grad_out, const Tensor& packed, const Tensor& absmax, int64_t n,
                                      int64_t group_size) {
  constexpr const char* op = "nf4_linear_backward";
  expect_nf4(op, packed, absmax, n, group_size);
  expect_float(op, "grad_out", grad_out);
  if (grad_out.dim() < 1 || grad_out.size(grad_out.dim() - 1) != packed.size(0))
    fail(op, "grad_out must have shape (..., m = ", packed.size(0), "), got ", tuple(grad_out.sizes()));
  expect_on(op, "grad_out", grad_out, place_of(packed));
  expect_contiguous(op, "grad_out", grad_out);
}

inline Nf4Matrix as_nf4(const Tensor& packed, const Tensor& absmax, int64_t n, int64_t group_size) {
  return {static_cast<uint8_t*>(packed.data_ptr()), static_cast<float*>(absmax.data_ptr()), n, int(group_size)};
}

}  // namespace lowrank
