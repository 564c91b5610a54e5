// The rules of lowrank_sys/_ops/int8.py.
#pragma once

#include <cmath>

#include "coded.h"

namespace lowrank {

inline void expect_int8(const char* op, const Tensor& codes, const Tensor& scale, int64_t group_size,
                        const char* scale_name = Int8Coding::scale) {
  expect_coded<Int8Coding>(op, codes, scale, group_size, {}, scale_name);
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

inline Int8Matrix as_int8(const Tensor& codes, const Tensor& scale, int64_t group_size) {
  return as_coded<Int8Coding>(codes, scale, codes.size(1), group_size);
}

}  // namespace lowrank
