// The rules of lowrank_sys/_ops/blockwise.py.
#pragma once

#include "../core/adam_8bit.h"
#include "projection.h"
#include "rounding.h"

namespace lowrank {

// The blocks of a tensor: of its rows, those of the last dimension, or of all of it as one row.
template <class Sizes>
RowBlocks blocks_of(const Sizes& shape, bool by_row) {
  RowBlocks blocks{1, 1};
  for (size_t i = 0; i < shape.size(); ++i) (by_row && i + 1 < shape.size() ? blocks.rows : blocks.columns) *= shape[i];
  return blocks;
}

// Shape of their absmax.
template <class Sizes>
Shape absmax_shape(const Sizes& shape, bool by_row) {
  Shape wanted;
  for (size_t i = 0; by_row && i + 1 < shape.size(); ++i) wanted.push_back(shape[i]);
  wanted.push_back(blocks_per_row(blocks_of(shape, by_row)));
  return wanted;
}

template <class Name, class AbsmaxName, class Sizes>
void expect_codes(const char* op, const Name& name, const Tensor& codes, const AbsmaxName& absmax_name, const Tensor& absmax,
                  const Sizes& shape, bool by_row, const Place& place) {
  expect_like(op, name, codes, shape, place);
  expect_dtype(op, name, codes, aoti_torch_dtype_uint8());
  expect_like(op, absmax_name, absmax, absmax_shape(shape, by_row), place);
  expect_dtype(op, absmax_name, absmax, aoti_torch_dtype_float32());
}

// Whether codes are in blocks by row: flat blocks have an absmax of one dimension.
inline bool is_by_row(const Tensor& codes, const Tensor& absmax) { return codes.dim() > 1 && absmax.dim() == codes.dim(); }

// Both moments of one tensor, as codes.
struct Stored {
  const Tensor &exp_avg, &exp_avg_sq, &exp_avg_absmax, &exp_avg_sq_absmax;

  Moments8bit pointers() const {
    return {static_cast<uint8_t*>(exp_avg.data_ptr()), static_cast<uint8_t*>(exp_avg_sq.data_ptr()),
            static_cast<float*>(exp_avg_absmax.data_ptr()), static_cast<float*>(exp_avg_sq_absmax.data_ptr())};
  }

  // Of R, by row.
  template <class Sizes>
  void check(const char* op, const Sizes& shape, const Place& place) const {
    expect_codes(op, "exp_avg", exp_avg, "exp_avg_absmax", exp_avg_absmax, shape, true, place);
    expect_codes(op, "exp_avg_sq", exp_avg_sq, "exp_avg_sq_absmax", exp_avg_sq_absmax, shape, true, place);
  }

  // As entry i of lists.
  template <class Sizes>
  void check(const char* op, const Sizes& shape, bool by_row, const Place& place, size_t i) const {
    expect_codes(op, Item{"exp_avgs", i}, exp_avg, Item{"exp_avg_absmaxes", i}, exp_avg_absmax, shape, by_row, place);
    expect_codes(op, Item{"exp_avg_sqs", i}, exp_avg_sq, Item{"exp_avg_sq_absmaxes", i}, exp_avg_sq_absmax, shape, by_row, place);
  }
};

// Of many tensors.
struct StoredLists {
  const Tensors &exp_avgs, &exp_avg_sqs, &exp_avg_absmaxes, &exp_avg_sq_absmaxes;

  Stored at(size_t i) const { return {exp_avgs[i], exp_avg_sqs[i], exp_avg_absmaxes[i], exp_avg_sq_absmaxes[i]}; }

  void check_lengths(const char* op, const char* first, const Tensors& model) const {
    check_length(op, "exp_avgs", exp_avgs, first, model);
    check_length(op, "exp_avg_sqs", exp_avg_sqs, first, model);
    check_length(op, "exp_avg_absmaxes", exp_avg_absmaxes, first, model);
    check_length(op, "exp_avg_sq_absmaxes", exp_avg_sq_absmaxes, first, model);
  }
};

inline void check_quantize_blockwise(const Tensor& x, bool by_row) {
  constexpr const char* op = "quantize_blockwise";
  expect_float(op, "x", x);
  expect_contiguous(op, "x", x);
  if (by_row && x.dim() < 2) fail(op, "x must have two or more dimensions with by_row, got shape ", tuple(x.sizes()));
}

inline void check_dequantize_blockwise(const Tensor& codes, const Tensor& absmax) {
  expect_codes("dequantize_blockwise", "codes", codes, "absmax", absmax, codes.sizes(), is_by_row(codes, absmax), place_of(codes));
}

inline void check_adam_8bit(const Tensors& params, const Tensors& grads, const StoredLists& moments, const Tensors& steps,
                            const Tensor& lr, const Draws& draws, const Guards& guards) {
  constexpr const char* op = "adam_8bit_";
  check_length(op, "grads", grads, "params", params);
  moments.check_lengths(op, "params", params);
  check_length(op, "steps", steps, "params", params);
  check_guards(op, params, steps, lr, guards);
  draws.check_streams(op, params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    expect_param_and_grad(op, i, params[i], grads[i]);
    moments.at(i).check(op, params[i].sizes(), false, place_of(params[i]), i);
  }
}

inline void check_adam_8bit_low_rank(const Tensors& low_rank_grads, const Tensors& updates, const StoredLists& moments,
                                     const Tensors& steps, const std::optional<Tensor>& grad_scale,
                                     const std::optional<Tensor>& found_inf) {
  constexpr const char *op = "adam_8bit_low_rank_", *first = "low_rank_grads";
  check_length(op, "updates", updates, first, low_rank_grads);
  moments.check_lengths(op, first, low_rank_grads);
  check_length(op, "steps", steps, first, low_rank_grads);
  if (low_rank_grads.empty()) return;
  check_guards(op, first, low_rank_grads, steps, nullptr, {grad_scale, found_inf, std::nullopt});
  for (size_t i = 0; i < low_rank_grads.size(); ++i) {
    const Tensor& r = low_rank_grads[i];
    expect_matrix(op, Item{first, i}, r);
    expect_dtype(op, Item{first, i}, r, aoti_torch_dtype_float32());
    expect_float(op, Item{"updates", i}, updates[i]);
    expect_like(op, Item{"updates", i}, updates[i], r.sizes(), place_of(r));
    moments.at(i).check(op, r.sizes(), true, place_of(r), i);
  }
}

}  // namespace lowrank
