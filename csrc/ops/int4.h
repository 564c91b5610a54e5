// The rules of lowrank_sys/_ops/int4.py.
#pragma once

#include "../core/int4.h"
#include "projection.h"

namespace lowrank {

inline void check_quantize_int4(const char* op, const Tensor& basis, int64_t group_size) {
  expect_matrix(op, "basis", basis);
  if (basis.size(1) < 1) fail(op, "rank must be at least 1, got basis of shape ", tuple(basis.sizes()));
  expect_group_size(op, group_size);
}

// What an op calls the three tensors of a basis.
struct Int4Names {
  const char *packed = "packed", *scale = "scale", *offset = "offset";
};

// packed, scale and offset are a basis (d, r) on `place`.
inline void expect_int4(const char* op, const Tensor& packed, const Tensor& scale, const Tensor& offset, int64_t d,
                        int64_t group_size, const Place& place, const Int4Names& names = {}) {
  expect_group_size(op, group_size);
  if (packed.dim() != 2 || packed.size(1) != (d + 1) / 2)
    fail(op, names.packed, " must have shape (r, ", (d + 1) / 2, ") for vectors of ", d, " entries, got ", tuple(packed.sizes()));
  if (packed.size(0) < 1) fail(op, "rank must be at least 1, got ", names.packed, " of shape ", tuple(packed.sizes()));
  expect_dtype(op, names.packed, packed, aoti_torch_dtype_uint8());
  expect_like(op, names.packed, packed, packed.sizes(), place);
  const Shape shape = {packed.size(0), (d + group_size - 1) / group_size};
  expect_low_rank(op, names.scale, scale, shape, place);
  expect_low_rank(op, names.offset, offset, shape, place);
}

inline void check_dequantize_int4(const char* op, const Tensor& packed, const Tensor& scale, const Tensor& offset, int64_t d,
                                  int64_t group_size) {
  if (d < 0) fail(op, "d must be at least 0, got ", d);
  expect_int4(op, packed, scale, offset, d, group_size, place_of(packed));
}

// Shape of R = project(matrix, basis) for a basis of packed.size(0) vectors.
inline Shape int4_low_rank_shape(const Tensor& matrix, const Tensor& packed, bool left) {
  if (left) return {packed.size(0), matrix.size(1)};
  return {matrix.size(0), packed.size(0)};
}

inline void check_project_int4(const char* op, const Tensor& grad, const Tensor& packed, const Tensor& scale, const Tensor& offset,
                               bool left, int64_t group_size) {
  expect_matrix(op, "grad", grad);
  expect_int4(op, packed, scale, offset, grad.size(left ? 0 : 1), group_size, place_of(grad));
}

inline void check_back_project_int4(const char* op, const Tensor& param, const Tensor& low_rank, const Tensor& packed,
                                    const Tensor& scale, const Tensor& offset, bool left, int64_t group_size) {
  expect_matrix(op, "param", param);
  expect_int4(op, packed, scale, offset, param.size(left ? 0 : 1), group_size, place_of(param));
  expect_low_rank(op, "low_rank", low_rank, int4_low_rank_shape(param, packed, left), place_of(param));
}

inline Int4 as_int4(const Tensor& packed, const Tensor& scale, const Tensor& offset, int64_t d, int64_t group_size) {
  return {static_cast<uint8_t*>(packed.data_ptr()),
          static_cast<float*>(scale.data_ptr()),
          static_cast<float*>(offset.data_ptr()),
          d,
          packed.size(0),
          int(group_size)};
}

}  // namespace lowrank
