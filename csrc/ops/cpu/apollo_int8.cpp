// torch.ops.lowrank on the CPU: APOLLO on INT8 weights.
#include "../apollo_int8.h"

#include "int8_products.h"
#include "residual.h"

namespace lowrank {
namespace {

constexpr const char* kOp = "apollo_int8_step";

// Returns how many weights were left out.
int64_t apollo(const Int8Weight& weight, const LowRankGradient& t, const std::optional<Tensor>& limiter, const AdamStep& step,
               double count, float grad_scale, const Scaling& how, Buffers& buffers) {
  const Channels c = apollo_channels(t, limiter, step, grad_scale, how, buffers);
  if (c.skipped < t.channels()) {
    const int64_t m = t.grad.size(0), n = t.grad.size(1);
    const Int8Step at{{corrected(step), step.decay},
                      {uint64_t(weight.seed), counter_step(count), uint32_t(weight.parameter)},
                      uint64_t(weight.offset)};
    const float* scales = c.coefficients.data();
    update_int8_scaled(as_int8(weight.codes, weight.scale, weight.group_size), {0, 0, m, n},
                       {storage(t.grad), data<void>(t.grad), n}, t.left ? nullptr : scales, t.left ? scales : nullptr, at);
  }
  return c.skipped * t.depth();
}

void apollo_plain(const Tensor& codes, const Tensor& weight_scale, const Tensor& grad, const Tensor& basis, const Tensor& exp_avg,
                  const Tensor& exp_avg_sq, const std::optional<Tensor>& limiter, int64_t step, double lr, double beta1,
                  double beta2, double eps, double weight_decay, double scale, bool left, int64_t seed, int64_t parameter,
                  bool per_tensor, bool scale_front, double growth, int64_t offset, int64_t group_size) {
  const Int8Weight weight{codes, weight_scale, group_size, seed, parameter, offset};
  check_apollo_int8(weight, grad, basis, exp_avg, exp_avg_sq, limiter, left);
  const double count = count_of(kOp, step);
  Buffers buffers;
  apollo(weight, {grad, basis, exp_avg, exp_avg_sq, left}, limiter, Hyper{beta1, beta2, eps, weight_decay}.at(count, lr), count,
         1.0f, apollo_scaling(scale, per_tensor, scale_front, growth), buffers);
}

void apollo_tensor(const Tensor& codes, const Tensor& weight_scale, const Tensor& grad, const Tensor& basis, const Tensor& exp_avg,
                   const Tensor& exp_avg_sq, const std::optional<Tensor>& limiter, const Tensor& step, const Tensor& lr,
                   double beta1, double beta2, double eps, double weight_decay, double scale, bool left, int64_t seed,
                   int64_t parameter, bool per_tensor, bool scale_front, double growth, int64_t offset, int64_t group_size) {
  const Int8Weight weight{codes, weight_scale, group_size, seed, parameter, offset};
  check_apollo_int8(weight, grad, basis, exp_avg, exp_avg_sq, limiter, left);
  const double count = number_of(kOp, "step", step, codes), rate = number_of(kOp, "lr", lr, codes);
  Buffers buffers;
  apollo(weight, {grad, basis, exp_avg, exp_avg_sq, left}, limiter, Hyper{beta1, beta2, eps, weight_decay}.at(count, rate), count,
         1.0f, apollo_scaling(scale, per_tensor, scale_front, growth), buffers);
}

void apollo_list(const Tensors& codes, const Tensors& weight_scales, const Tensors& grads, const Tensors& bases,
                 const Tensors& exp_avgs, const Tensors& exp_avg_sqs, const Tensors& limiters, const Tensors& steps,
                 const Tensor& lr, double beta1, double beta2, double eps, double weight_decay, double scale, bool left,
                 int64_t seed, const std::vector<int64_t>& parameters, bool per_tensor, bool scale_front, double growth,
                 const std::vector<int64_t>& offsets, int64_t group_size, const std::optional<Tensor>& grad_scale,
                 const std::optional<Tensor>& found_inf, const std::optional<Tensor>& skipped) {
  const Guards guards{grad_scale, found_inf, skipped};
  const Int8Weights weights{codes, weight_scales, group_size, seed, parameters, offsets};
  check_length(kOp, "weight_scales", weight_scales, "codes", codes);
  check_length(kOp, "grads", grads, "codes", codes);
  check_length(kOp, "bases", bases, "codes", codes);
  check_length(kOp, "exp_avgs", exp_avgs, "codes", codes);
  check_length(kOp, "exp_avg_sqs", exp_avg_sqs, "codes", codes);
  if (!limiters.empty()) check_length(kOp, "limiters", limiters, "codes", codes);
  check_length(kOp, "steps", steps, "codes", codes);
  weights.check_lengths_of_numbers(kOp);
  check_guards(kOp, "codes", codes, steps, &lr, guards);
  for (size_t i = 0; i < codes.size(); ++i)
    check_apollo_int8(weights.at(i), grads[i], bases[i], exp_avgs[i], exp_avg_sqs[i], entry(limiters, i), left);
  const double rate = read_number(kOp, "lr", lr);
  if (is_no_op(guards)) return;
  const Hyper hyper{beta1, beta2, eps, weight_decay};
  const Scaling how = apollo_scaling(scale, per_tensor, scale_front, growth);
  Buffers buffers;
  for (size_t i = 0; i < codes.size(); ++i) {
    const float step = *data<float>(steps[i]) += 1.0f;
    count_skipped(guards, apollo(weights.at(i), {grads[i], bases[i], exp_avgs[i], exp_avg_sqs[i], left}, entry(limiters, i),
                                 hyper.at(step, rate), step, grad_scale_of(guards), how, buffers));
  }
}

STABLE_TORCH_LIBRARY_IMPL(lowrank, CPU, library) {
  library.impl("apollo_int8_step.tensor", TORCH_BOX(&apollo_tensor));
  library.impl("apollo_int8_step", TORCH_BOX(&apollo_plain));
  library.impl("apollo_int8_step.list", TORCH_BOX(&apollo_list));
}

}  // namespace
}  // namespace lowrank
