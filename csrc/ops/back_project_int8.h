// The rules of lowrank_sys/_ops/back_project_int8.py.
#pragma once

#include "int4.h"
#include "int8.h"

namespace lowrank {

// A basis: a matrix, or the packed codes of INT4 with their scales and offsets.
struct AnyBasis {
  const Tensor& basis;
  std::optional<Tensor> scale, offset;
  int64_t group_size;

  bool is_int4() const { return scale.has_value(); }
  int64_t rank() const { return basis.size(is_int4() ? 0 : 1); }

  Shape low_rank_shape(const Tensor& codes, bool left) const {
    if (left) return {rank(), codes.size(1)};
    return {codes.size(0), rank()};
  }

  void check(const char* op, const Tensor& codes, bool left) const {
    if (scale.has_value() != offset.has_value()) fail(op, "basis_scale and basis_offset must be given together");
    if (!is_int4()) return expect_basis(op, codes, basis, left);
    expect_int4(op, basis, *scale, *offset, codes.size(left ? 0 : 1), group_size, place_of(codes),
                {"basis", "basis_scale", "basis_offset"});
  }
};

inline void check_back_project_int8(const Tensor& codes, const Tensor& scale, const Tensor& low_rank, const AnyBasis& basis,
                                    bool left, int64_t group_size) {
  constexpr const char* op = "back_project_int8_";
  expect_int8(op, codes, scale, group_size);
  basis.check(op, codes, left);
  expect_low_rank(op, "low_rank", low_rank, basis.low_rank_shape(codes, left), place_of(codes));
}

}  // namespace lowrank
