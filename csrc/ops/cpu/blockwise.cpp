// torch.ops.lowrank on the CPU: blockwise 8-bit codes, and steps whose moments are stored so.
#include "blockwise.h"

#include "../../cpu/blockwise.h"
#include "int4_products.h"

namespace lowrank {

int64_t adam_8bit_low_rank(const Tensor& r, const Stored& moments, const Tensor& x, std::vector<uint8_t>& ok, const AdamStep& step,
                           float grad_scale, bool left) {
  const RowBlocks blocks = blocks_of(r.sizes(), true);
  const int64_t count = block_count(blocks);
  ok.assign(left ? blocks.columns : blocks.rows, 1);
  LowRankAdam8bit adam{data<float>(r), storage(x), data<void>(x), moments.pointers(), nullptr, blocks, left, grad_scale, step};
  parallel(count, kBlock, [&](int64_t begin, int64_t end) { blockwise_kernels().mark_channels(adam, ok.data(), begin, end); });
  const int64_t skipped = std::count(ok.begin(), ok.end(), 0);
  if (skipped > 0) adam.ok = ok.data();
  parallel(count, kBlock, [&](int64_t begin, int64_t end) { blockwise_kernels().low_rank_adam(adam, begin, end); });
  return skipped;
}

namespace {

std::tuple<Tensor, Tensor> quantize_blockwise(const Tensor& x, bool is_signed, bool by_row) {
  check_quantize_blockwise(x, by_row);
  const auto sizes = x.sizes();
  const RowBlocks blocks = blocks_of(sizes, by_row);
  const Tensor codes = empty(Shape(sizes.begin(), sizes.end()), aoti_torch_dtype_uint8());
  const Tensor absmax = empty(absmax_shape(sizes, by_row));
  const Blockwise work{storage(x), data<void>(x), data<uint8_t>(codes), data<float>(absmax), blocks, is_signed};
  parallel(block_count(blocks), kBlock, [&](int64_t begin, int64_t end) { blockwise_kernels().quantize(work, begin, end); });
  return {codes, absmax};
}

Tensor dequantize_blockwise(const Tensor& codes, const Tensor& absmax, bool is_signed) {
  check_dequantize_blockwise(codes, absmax);
  const auto sizes = codes.sizes();
  const RowBlocks blocks = blocks_of(sizes, is_by_row(codes, absmax));
  const Tensor x = empty(Shape(sizes.begin(), sizes.end()));
  const Blockwise work{DType::f32, data<void>(x), data<uint8_t>(codes), data<float>(absmax), blocks, is_signed};
  parallel(block_count(blocks), kBlock, [&](int64_t begin, int64_t end) { blockwise_kernels().dequantize(work, begin, end); });
  return x;
}

void adam_8bit(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
               const Tensors& exp_avg_absmaxes, const Tensors& exp_avg_sq_absmaxes, const Tensors& steps, const Tensor& lr,
               double beta1, double beta2, double eps, double weight_decay, const std::optional<Tensor>& grad_scale,
               const std::optional<Tensor>& found_inf, const std::optional<Tensor>& skipped) {
  const Guards guards{grad_scale, found_inf, skipped};
  const StoredLists moments{exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes};
  check_adam_8bit(params, grads, moments, steps, lr, guards);
  const double rate = read_number("adam_8bit_", "lr", lr);
  if (is_no_op(guards)) return;
  const Hyper hyper{beta1, beta2, eps, weight_decay, 1.0};
  for (size_t i = 0; i < params.size(); ++i) {
    const float step = *data<float>(steps[i]) += 1.0f;
    const Adam8bit adam{storage(params[i]),       storage(grads[i]), data<void>(params[i]), data<void>(grads[i]),
                        moments.at(i).pointers(), params[i].numel(), grad_scale_of(guards), hyper.at(step, rate)};
    std::atomic<int64_t> left_out = 0;
    parallel(block_count({1, adam.numel}), kBlock,
             [&](int64_t begin, int64_t end) { left_out += blockwise_kernels().adam(adam, begin, end); });
    count_skipped(guards, left_out);
  }
}

void adam_8bit_low_rank_list(const Tensors& low_rank_grads, const Tensors& updates, const Tensors& exp_avgs,
                             const Tensors& exp_avg_sqs, const Tensors& exp_avg_absmaxes, const Tensors& exp_avg_sq_absmaxes,
                             const Tensors& steps, double beta1, double beta2, double eps, bool left,
                             const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
  const StoredLists moments{exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes};
  check_adam_8bit_low_rank(low_rank_grads, updates, moments, steps, grad_scale, found_inf);
  const Guards guards{grad_scale, found_inf, std::nullopt};
  if (is_no_op(guards)) return;
  const Hyper hyper{beta1, beta2, eps, 0.0, 1.0};
  std::vector<uint8_t> ok;
  for (size_t i = 0; i < low_rank_grads.size(); ++i)
    adam_8bit_low_rank(low_rank_grads[i], moments.at(i), updates[i], ok, hyper.at(*data<float>(steps[i]), 0.0),
                       grad_scale_of(guards), left);
}

// The two products of a step.

void project_on(const DenseBasis& basis, const Tensor& r, const Tensor& grad, bool left, Workspace& work) {
  project_into(r, grad, as_fp32(basis.basis, work.basis), left, work.tile);
}

void back_project_on(const DenseBasis& basis, const Tensor& param, const Tensor& x, bool left, const AdamStep& step,
                     const uint8_t* ok, Workspace& work) {
  back_project_into(param, x, as_fp32(basis.basis, work.basis), left, step.decay, step.alpha, ok, work.tile);
}

Int4 unpacked(const Int4Basis& basis, const Tensor& matrix, bool left) {
  return as_int4(basis.packed, basis.scale, basis.offset, matrix.size(left ? 0 : 1), basis.group_size);
}

void project_on(const Int4Basis& basis, const Tensor& r, const Tensor& grad, bool left, Workspace& work) {
  project_int4_into(r, grad, unpacked(basis, grad, left), left, work.basis, work.tile);
}

void back_project_on(const Int4Basis& basis, const Tensor& param, const Tensor& x, bool left, const AdamStep& step,
                     const uint8_t* ok, Workspace& work) {
  back_project_int4_into(param, x, unpacked(basis, param, left), left, step.decay, step.alpha, ok, work.basis, work.tile);
}

// `gradient` is R if `projected`, else G. Returns how many weights were left out.
template <class Basis>
int64_t low_rank_step(const Tensor& param, const Tensor& gradient, const Basis& basis, const Stored& moments, const AdamStep& step,
                      float grad_scale, bool projected, bool left, Workspace& work) {
  const Tensor x = work.low_rank.matrix(moments.exp_avg.size(0), moments.exp_avg.size(1));
  if (!projected) project_on(basis, x, gradient, left, work);
  std::vector<uint8_t> ok;
  const int64_t skipped = adam_8bit_low_rank(projected ? gradient : x, moments, x, ok, step, grad_scale, left);
  if (skipped < int64_t(ok.size())) back_project_on(basis, param, x, left, step, skipped > 0 ? ok.data() : nullptr, work);
  return skipped * param.size(left ? 0 : 1);
}

constexpr const char *kGalore = "galore_step_8bit", *kSubspace = "subspace_step_8bit";

void galore_step_8bit(const Tensor& param, const Tensor& grad, const Tensor& basis, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                      const Tensor& exp_avg_absmax, const Tensor& exp_avg_sq_absmax, int64_t step, double lr, double beta1,
                      double beta2, double eps, double weight_decay, double scale, bool left) {
  const Stored moments{exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax};
  const DenseBasis dense{basis};
  check_low_rank_step_8bit(kGalore, param, grad, dense, moments, false, left);
  if (step < 1) fail(kGalore, "step counts from 1, got ", step);
  const Hyper hyper{beta1, beta2, eps, weight_decay, scale};
  Workspace work;
  low_rank_step(param, grad, dense, moments, hyper.at(double(step), lr), 1.0f, false, left, work);
}

void galore_step_8bit_tensor(const Tensor& param, const Tensor& grad, const Tensor& basis, const Tensor& exp_avg,
                             const Tensor& exp_avg_sq, const Tensor& exp_avg_absmax, const Tensor& exp_avg_sq_absmax,
                             const Tensor& step, const Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
                             double scale, bool left) {
  const Stored moments{exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax};
  const DenseBasis dense{basis};
  check_low_rank_step_8bit(kGalore, param, grad, dense, moments, false, left);
  expect_scalar(kGalore, "step", step, place_of(param));
  const double count = read_number(kGalore, "step", step);
  expect_scalar(kGalore, "lr", lr, place_of(param));
  const Hyper hyper{beta1, beta2, eps, weight_decay, scale};
  Workspace work;
  low_rank_step(param, grad, dense, moments, hyper.at(count, read_number(kGalore, "lr", lr)), 1.0f, false, left, work);
}

// The list forms; `basis_of(i)` is a DenseBasis or an Int4Basis, and the lists that it is made of have been checked.
template <class BasisOf>
void step_list(const char* op, const Tensors& params, const Tensors& gradients, const BasisOf& basis_of, const StoredLists& moments,
               const Tensors& steps, const Tensor& lr, const Hyper& hyper, const Guards& guards, bool projected, bool left) {
  moments.check_lengths(op, "params", params);
  check_length(op, "steps", steps, "params", params);
  check_guards(op, params, steps, lr, guards);
  for (size_t i = 0; i < params.size(); ++i)
    check_low_rank_step_8bit(op, params[i], gradients[i], basis_of(i), moments.at(i), projected, left);
  const double rate = read_number(op, "lr", lr);
  if (is_no_op(guards)) return;
  Workspace work;
  for (size_t i = 0; i < params.size(); ++i) {
    const float step = *data<float>(steps[i]) += 1.0f;
    count_skipped(guards, low_rank_step(params[i], gradients[i], basis_of(i), moments.at(i), hyper.at(step, rate),
                                        grad_scale_of(guards), projected, left, work));
  }
}

template <bool projected>
void step_list_dense(const Tensors& params, const Tensors& gradients, const Tensors& bases, const Tensors& exp_avgs,
                     const Tensors& exp_avg_sqs, const Tensors& exp_avg_absmaxes, const Tensors& exp_avg_sq_absmaxes,
                     const Tensors& steps, const Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
                     double scale, bool left, const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                     const std::optional<Tensor>& skipped) {
  const char* op = projected ? kSubspace : kGalore;
  check_length(op, projected ? "low_rank_grads" : "grads", gradients, "params", params);
  check_length(op, "bases", bases, "params", params);
  step_list(
      op, params, gradients, [&](size_t i) { return DenseBasis{bases[i]}; },
      {exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes}, steps, lr, {beta1, beta2, eps, weight_decay, scale},
      {grad_scale, found_inf, skipped}, projected, left);
}

template <bool projected>
void step_list_int4(const Tensors& params, const Tensors& gradients, const Tensors& bases, const Tensors& basis_scales,
                    const Tensors& basis_offsets, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                    const Tensors& exp_avg_absmaxes, const Tensors& exp_avg_sq_absmaxes, const Tensors& steps, const Tensor& lr,
                    double beta1, double beta2, double eps, double weight_decay, double scale, bool left, int64_t group_size,
                    const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                    const std::optional<Tensor>& skipped) {
  const char* op = projected ? kSubspace : kGalore;
  check_length(op, projected ? "low_rank_grads" : "grads", gradients, "params", params);
  check_length(op, "bases", bases, "params", params);
  check_length(op, "basis_scales", basis_scales, "params", params);
  check_length(op, "basis_offsets", basis_offsets, "params", params);
  step_list(
      op, params, gradients, [&](size_t i) { return Int4Basis{bases[i], basis_scales[i], basis_offsets[i], group_size}; },
      {exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes}, steps, lr, {beta1, beta2, eps, weight_decay, scale},
      {grad_scale, found_inf, skipped}, projected, left);
}

STABLE_TORCH_LIBRARY_IMPL(lowrank, CPU, library) {
  library.impl("quantize_blockwise", TORCH_BOX(&quantize_blockwise));
  library.impl("dequantize_blockwise", TORCH_BOX(&dequantize_blockwise));
  library.impl("adam_8bit_", TORCH_BOX(&adam_8bit));
  library.impl("adam_8bit_low_rank_", TORCH_BOX(&adam_8bit_low_rank_list));
  library.impl("galore_step_8bit.tensor", TORCH_BOX(&galore_step_8bit_tensor));
  library.impl("galore_step_8bit", TORCH_BOX(&galore_step_8bit));
  library.impl("galore_step_8bit.list", TORCH_BOX(&step_list_dense<false>));
  library.impl("galore_step_8bit.int4", TORCH_BOX(&step_list_int4<false>));
  library.impl("subspace_step_8bit.list", TORCH_BOX(&step_list_dense<true>));
  library.impl("subspace_step_8bit.int4", TORCH_BOX(&step_list_int4<true>));
}

}  // namespace
}  // namespace lowrank
