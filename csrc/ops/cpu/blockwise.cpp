// torch.ops.lowrank on the CPU: blockwise 8-bit codes, and steps whose moments are stored so.
#include "blockwise.h"

#include "../../cpu/blockwise.h"
#include "products.h"

namespace lowrank {

int64_t adam_8bit_low_rank(const Tensor& r, const Stored& moments, const Tensor& x, std::vector<uint8_t>& ok,
                           const AdamStep& step, float grad_scale, bool left) {
  const int64_t rows = r.size(0), columns = r.size(1), count = blocks(r.sizes());
  ok.assign(left ? columns : rows, 1);
  LowRankAdam8bit adam{data<float>(r), storage(x), data<void>(x), moments.pointers(), nullptr, rows, columns, left,
                       grad_scale, step};
  parallel(count, kBlock, [&](int64_t begin, int64_t end) { blockwise_kernels().mark_channels(adam, ok.data(), begin, end); });
  const int64_t skipped = std::count(ok.begin(), ok.end(), 0);
  if (skipped > 0) adam.ok = ok.data();
  parallel(count, kBlock, [&](int64_t begin, int64_t end) { blockwise_kernels().low_rank_adam(adam, begin, end); });
  return skipped;
}

namespace {

std::tuple<Tensor, Tensor> quantize_blockwise(const Tensor& x, bool is_signed) {
  check_quantize_blockwise(x);
  const auto sizes = x.sizes();
  const int64_t count = blocks(sizes);
  const Tensor codes = empty(Shape(sizes.begin(), sizes.end()), aoti_torch_dtype_uint8()), absmax = empty({count});
  const Blockwise work{storage(x), data<void>(x), data<uint8_t>(codes), data<float>(absmax), x.numel(), is_signed};
  parallel(count, kBlock, [&](int64_t begin, int64_t end) { blockwise_kernels().quantize(work, begin, end); });
  return {codes, absmax};
}

Tensor dequantize_blockwise(const Tensor& codes, const Tensor& absmax, bool is_signed) {
  check_dequantize_blockwise(codes, absmax);
  const auto sizes = codes.sizes();
  const Tensor x = empty(Shape(sizes.begin(), sizes.end()));
  const Blockwise work{DType::f32, data<void>(x), data<uint8_t>(codes), data<float>(absmax), x.numel(), is_signed};
  parallel(blocks(sizes), kBlock, [&](int64_t begin, int64_t end) { blockwise_kernels().dequantize(work, begin, end); });
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
    parallel(blocks(params[i].sizes()), kBlock,
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

// Returns how many weights were left out.
int64_t galore(const Tensor& param, const Tensor& grad, const Tensor& basis, const Stored& moments, const AdamStep& step,
               float grad_scale, bool left, Workspace& work) {
  const Tensor b = as_fp32(basis, work.basis), r = work.low_rank.matrix(moments.exp_avg.size(0), moments.exp_avg.size(1));
  project_into(r, grad, b, left, work.tile);
  std::vector<uint8_t> ok;
  const int64_t skipped = adam_8bit_low_rank(r, moments, r, ok, step, grad_scale, left);
  if (skipped < int64_t(ok.size()))
    back_project_into(param, r, b, left, step.decay, step.alpha, skipped > 0 ? ok.data() : nullptr, work.tile);
  return skipped * param.size(left ? 0 : 1);
}

constexpr const char* kGalore = "galore_step_8bit";

void galore_step_8bit(const Tensor& param, const Tensor& grad, const Tensor& basis, const Tensor& exp_avg,
                      const Tensor& exp_avg_sq, const Tensor& exp_avg_absmax, const Tensor& exp_avg_sq_absmax, int64_t step,
                      double lr, double beta1, double beta2, double eps, double weight_decay, double scale, bool left) {
  const Stored moments{exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax};
  check_galore_step_8bit(param, grad, basis, moments, left);
  if (step < 1) fail(kGalore, "step counts from 1, got ", step);
  const Hyper hyper{beta1, beta2, eps, weight_decay, scale};
  Workspace work;
  galore(param, grad, basis, moments, hyper.at(double(step), lr), 1.0f, left, work);
}

void galore_step_8bit_tensor(const Tensor& param, const Tensor& grad, const Tensor& basis, const Tensor& exp_avg,
                             const Tensor& exp_avg_sq, const Tensor& exp_avg_absmax, const Tensor& exp_avg_sq_absmax,
                             const Tensor& step, const Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
                             double scale, bool left) {
  const Stored moments{exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax};
  check_galore_step_8bit(param, grad, basis, moments, left);
  expect_scalar(kGalore, "step", step, place_of(param));
  const double count = read_number(kGalore, "step", step);
  expect_scalar(kGalore, "lr", lr, place_of(param));
  const Hyper hyper{beta1, beta2, eps, weight_decay, scale};
  Workspace work;
  galore(param, grad, basis, moments, hyper.at(count, read_number(kGalore, "lr", lr)), 1.0f, left, work);
}

void galore_step_8bit_list(const Tensors& params, const Tensors& grads, const Tensors& bases, const Tensors& exp_avgs,
                           const Tensors& exp_avg_sqs, const Tensors& exp_avg_absmaxes, const Tensors& exp_avg_sq_absmaxes,
                           const Tensors& steps, const Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
                           double scale, bool left, const std::optional<Tensor>& grad_scale,
                           const std::optional<Tensor>& found_inf, const std::optional<Tensor>& skipped) {
  const Guards guards{grad_scale, found_inf, skipped};
  const StoredLists moments{exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes};
  check_length(kGalore, "grads", grads, "params", params);
  check_length(kGalore, "bases", bases, "params", params);
  moments.check_lengths(kGalore, "params", params);
  check_length(kGalore, "steps", steps, "params", params);
  check_guards(kGalore, params, steps, lr, guards);
  for (size_t i = 0; i < params.size(); ++i) check_galore_step_8bit(params[i], grads[i], bases[i], moments.at(i), left);
  const double rate = read_number(kGalore, "lr", lr);
  if (is_no_op(guards)) return;
  const Hyper hyper{beta1, beta2, eps, weight_decay, scale};
  Workspace work;
  for (size_t i = 0; i < params.size(); ++i) {
    const float step = *data<float>(steps[i]) += 1.0f;
    count_skipped(guards, galore(params[i], grads[i], bases[i], moments.at(i), hyper.at(step, rate), grad_scale_of(guards),
                                 left, work));
  }
}

STABLE_TORCH_LIBRARY_IMPL(lowrank, CPU, library) {
  library.impl("quantize_blockwise", TORCH_BOX(&quantize_blockwise));
  library.impl("dequantize_blockwise", TORCH_BOX(&dequantize_blockwise));
  library.impl("adam_8bit_", TORCH_BOX(&adam_8bit));
  library.impl("adam_8bit_low_rank_", TORCH_BOX(&adam_8bit_low_rank_list));
  library.impl("galore_step_8bit.tensor", TORCH_BOX(&galore_step_8bit_tensor));
  library.impl("galore_step_8bit", TORCH_BOX(&galore_step_8bit));
  library.impl("galore_step_8bit.list", TORCH_BOX(&galore_step_8bit_list));
}

}  // namespace
}  // namespace lowrank
