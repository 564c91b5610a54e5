// The rules of lowrank_sys/_ops/rounding.py.
#pragma once

#include "int8.h"

namespace lowrank {

inline void check_numbers(const char* op, const char* name, const std::vector<int64_t>& numbers, size_t count) {
  if (numbers.size() != count) fail(op, name, " must have ", count, " numbers, one a weight, got ", numbers.size());
}

// Whether the weights of a step are rounded stochastically, and where the random bits of each are.
struct Draws {
  bool stochastic;
  int64_t seed;
  const std::vector<int64_t>&parameters, &offsets;

  // Their lengths must fit where they are `needed`.
  void check(const char* op, size_t count, bool needed) const {
    if (!needed) return;
    check_numbers(op, "parameters", parameters, count);
    if (!offsets.empty()) check_numbers(op, "offsets", offsets, count);
  }

  int64_t parameter(size_t i) const { return parameters[i]; }
  int64_t offset(size_t i) const { return offsets.empty() ? 0 : offsets[i]; }

  void check_streams(const char* op, size_t count) const {
    if (!stochastic) return;
    check(op, count, true);
    for (size_t i = 0; i < count; ++i) expect_stream(op, parameter(i), offset(i));
  }
};

inline void check_round_stochastic(const Tensor& param, const Tensor& values, const Tensor& step, int64_t parameter,
                                   int64_t offset) {
  constexpr const char* op = "round_stochastic_";
  const Place place = place_of(param);
  expect_float(op, "param", param);
  expect_contiguous(op, "param", param);
  expect_like(op, "values", values, param.sizes(), place);
  expect_dtype(op, "values", values, aoti_torch_dtype_float32());
  expect_number(op, "step", step, place);
  expect_stream(op, parameter, offset);
}

}  // namespace lowrank
