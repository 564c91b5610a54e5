// The rules of lowrank_sys/_ops/qgalore.py.
#pragma once

#include "blockwise.h"
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

// An INT8 weight of a step, and where its random bits are.
struct Int8Weight {
  const Tensor &codes, &scale;
  int64_t group_size, seed, parameter, offset;
};

// `projected` says whether the gradient is R.
inline void check_qgalore(const char* op, const Int8Weight& weight, const Tensor& gradient, const AnyBasis& basis,
                          const Stored& moments, bool projected, bool left) {
  const Tensor& codes = weight.codes;
  expect_int8(op, codes, weight.scale, weight.group_size, "weight_scale");
  if (!projected) {
    expect_float(op, "grad", gradient);
    expect_like(op, "grad", gradient, codes.sizes(), place_of(codes));
  }
  basis.check(op, codes, left);
  const Shape shape = basis.low_rank_shape(codes, left);
  if (projected) expect_low_rank(op, "low_rank_grad", gradient, shape, place_of(codes));
  moments.check(op, shape, place_of(codes));
  expect_stream(op, weight.parameter, weight.offset);
}

// A list of integers, one a matrix.
inline void check_numbers(const char* op, const char* name, const std::vector<int64_t>& numbers, size_t count) {
  if (numbers.size() != count) fail(op, name, " must have ", count, " numbers, one for each of codes, got ", numbers.size());
}

// INT8 weights of a list form; no offsets are 0.
struct Int8Weights {
  const Tensors &codes, &scales;
  int64_t group_size, seed;
  const std::vector<int64_t>&parameters, &offsets;

  Int8Weight at(size_t i) const { return {codes[i], scales[i], group_size, seed, parameters[i], offsets.empty() ? 0 : offsets[i]}; }

  void check_lengths_of_numbers(const char* op) const {
    check_numbers(op, "parameters", parameters, codes.size());
    if (!offsets.empty()) check_numbers(op, "offsets", offsets, codes.size());
  }
};

}  // namespace lowrank
