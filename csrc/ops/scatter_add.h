// The rules of lowrank_sys/_ops/scatter_add.py.
#pragma once

#include "rules.h"

namespace lowrank {

inline void check_scatter_add_product(const Tensor& b, const Tensor& a, const Tensor& values, const Tensor& columns,
                                      int32_t dtype) {
  constexpr const char* op = "scatter_add_product";
  expect_matrix(op, "b", b);
  expect_matrix(op, "a", a);
  expect_matrix(op, "values", values);
  const int64_t m = b.size(0), r = b.size(1), n = a.size(1), k = values.size(1);
  if (r < 1) fail(op, "rank must be at least 1, got b of shape ", tuple(b.sizes()));
  expect_like(op, "a", a, Shape{r, n}, place_of(b));
  expect_like(op, "values", values, Shape{m, k}, place_of(b));
  if (k > n) fail(op, "values must have at most n = ", n, " columns, got shape ", tuple(values.sizes()));
  expect_like(op, "columns", columns, Shape{m, k}, place_of(b));
  expect_dtype(op, "columns", columns, aoti_torch_dtype_int32());
  if (!is_float(dtype)) fail(op, "dtype must be float32, bfloat16 or float16, got ", dtype_name(dtype));
}

}  // namespace lowrank
