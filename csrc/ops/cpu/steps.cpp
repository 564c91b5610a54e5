// torch.ops.lowrank on the CPU: fused optimizer steps.
#include "../steps.h"

#include "../../cpu/steps.h"
#include "hyper.h"
#include "int8_gemm.h"

namespace lowrank {
namespace {

// How a step multiplies.
struct Products {
  bool left, int8_gemm;
};

// One step from the projected gradient r; x, which may be r, gets the Adam update. Returns the number of weights left out.
int64_t step_from(const Tensor& param, const Tensor& r, const Tensor& x, const Tensor& basis, const Tensor& exp_avg,
                  const Tensor& exp_avg_sq, const AdamStep& step, float grad_scale, const Products& products, Workspace& work) {
  const bool left = products.left;
  const int64_t rows = r.size(0), columns = r.size(1), channels = left ? columns : rows;
  std::vector<uint8_t> ok(channels);
  const LowRankAdam adam{
      data<float>(r), data<float>(exp_avg), data<float>(exp_avg_sq), data<float>(x), ok.data(), rows, columns, grad_scale, step};
  std::atomic<int64_t> skipped = 0;
  parallel(channels, left ? rows : columns, [&](int64_t begin, int64_t end) {
    skipped += (left ? step_kernels().adam_columns : step_kernels().adam_rows)(adam, begin, end);
  });
  const uint8_t* flags = skipped > 0 ? ok.data() : nullptr;
  if (skipped < channels && products.int8_gemm) {
    back_project_int8_gemm(param, x, basis, left, step.decay, step.alpha, flags, work);
  } else if (skipped < channels) {
    back_project_into(param, x, as_fp32(basis, work.basis), left, step.decay, step.alpha, flags, work.tile);
  }
  return skipped * param.size(left ? 0 : 1);
}

struct Galore {
  static constexpr const char* name = "galore_step";

  static void check(const Tensor& param, const Tensor& grad, const Tensor& basis, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                    bool left) {
    check_galore_step(name, param, grad, basis, exp_avg, exp_avg_sq, left);
  }

  static int64_t run(const Tensor& param, const Tensor& grad, const Tensor& basis, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                     const AdamStep& step, float grad_scale, const Products& products, Workspace& work) {
    const Tensor r = work.low_rank.matrix(exp_avg.size(0), exp_avg.size(1));
    if (products.int8_gemm) {
      project_int8_gemm(r, grad, basis, products.left, work);
      return step_from(param, r, r, basis, exp_avg, exp_avg_sq, step, grad_scale, products, work);
    }
    const Tensor b = as_fp32(basis, work.basis);
    project_into(r, grad, b, products.left, work.tile);
    return step_from(param, r, r, b, exp_avg, exp_avg_sq, step, grad_scale, products, work);
  }
};

struct Subspace {
  static constexpr const char* name = "subspace_step";

  static void check(const Tensor& param, const Tensor& low_rank_grad, const Tensor& basis, const Tensor& exp_avg,
                    const Tensor& exp_avg_sq, bool left) {
    check_subspace_step(name, param, &low_rank_grad, basis, exp_avg, exp_avg_sq, left);
  }

  static int64_t run(const Tensor& param, const Tensor& r, const Tensor& basis, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                     const AdamStep& step, float grad_scale, const Products& products, Workspace& work) {
    const Tensor x = work.low_rank.matrix(r.size(0), r.size(1));
    return step_from(param, r, x, basis, exp_avg, exp_avg_sq, step, grad_scale, products, work);
  }
};

template <class Op>
void step_plain(const Tensor& param, const Tensor& grad, const Tensor& basis, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                int64_t step, double lr, double beta1, double beta2, double eps, double weight_decay, double scale, bool left,
                bool int8_gemm) {
  Op::check(param, grad, basis, exp_avg, exp_avg_sq, left);
  if (step < 1) fail(Op::name, "step counts from 1, got ", step);
  const Hyper hyper{beta1, beta2, eps, weight_decay, scale};
  Workspace work;
  Op::run(param, grad, basis, exp_avg, exp_avg_sq, hyper.at(double(step), lr), 1.0f, {left, int8_gemm}, work);
}

template <class Op>
void step_tensor(const Tensor& param, const Tensor& grad, const Tensor& basis, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                 const Tensor& step, const Tensor& lr, double beta1, double beta2, double eps, double weight_decay, double scale,
                 bool left, bool int8_gemm) {
  Op::check(param, grad, basis, exp_avg, exp_avg_sq, left);
  expect_scalar(Op::name, "step", step, place_of(param));
  expect_scalar(Op::name, "lr", lr, place_of(param));
  const Hyper hyper{beta1, beta2, eps, weight_decay, scale};
  Workspace work;
  const AdamStep at = hyper.at(read_number(Op::name, "step", step), read_number(Op::name, "lr", lr));
  Op::run(param, grad, basis, exp_avg, exp_avg_sq, at, 1.0f, {left, int8_gemm}, work);
}

template <class Op>
void step_list(const Tensors& params, const Tensors& grads, const Tensors& bases, const Tensors& exp_avgs,
               const Tensors& exp_avg_sqs, const Tensors& steps, const Tensor& lr, double beta1, double beta2, double eps,
               double weight_decay, double scale, bool left, const std::optional<Tensor>& grad_scale,
               const std::optional<Tensor>& found_inf, const std::optional<Tensor>& skipped, bool int8_gemm) {
  const Guards guards{grad_scale, found_inf, skipped};
  check_length(Op::name, "grads", grads, "params", params);
  check_length(Op::name, "bases", bases, "params", params);
  check_length(Op::name, "exp_avgs", exp_avgs, "params", params);
  check_length(Op::name, "exp_avg_sqs", exp_avg_sqs, "params", params);
  check_length(Op::name, "steps", steps, "params", params);
  check_guards(Op::name, params, steps, lr, guards);
  for (size_t i = 0; i < params.size(); ++i) Op::check(params[i], grads[i], bases[i], exp_avgs[i], exp_avg_sqs[i], left);
  const double rate = read_number(Op::name, "lr", lr);
  if (is_no_op(guards)) return;
  const Hyper hyper{beta1, beta2, eps, weight_decay, scale};
  Workspace work;
  for (size_t i = 0; i < params.size(); ++i) {
    const float step = *data<float>(steps[i]) += 1.0f;
    count_skipped(guards, Op::run(params[i], grads[i], bases[i], exp_avgs[i], exp_avg_sqs[i], hyper.at(step, rate),
                                  grad_scale_of(guards), {left, int8_gemm}, work));
  }
}

void adamw_step(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                const Tensors& steps, const Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
                const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                const std::optional<Tensor>& skipped) {
  const Guards guards{grad_scale, found_inf, skipped};
  check_adamw_step(params, grads, exp_avgs, exp_avg_sqs, steps, lr, guards);
  const double rate = read_number("adamw_step", "lr", lr);
  if (is_no_op(guards)) return;
  const Hyper hyper{beta1, beta2, eps, weight_decay, 1.0};
  for (size_t i = 0; i < params.size(); ++i) {
    const float step = *data<float>(steps[i]) += 1.0f;
    const AdamW adam{storage(params[i]),       storage(grads[i]),           data<void>(params[i]), data<void>(grads[i]),
                     data<float>(exp_avgs[i]), data<float>(exp_avg_sqs[i]), grad_scale_of(guards), hyper.at(step, rate)};
    std::atomic<int64_t> left_out = 0;
    parallel(params[i].numel(), 1, [&](int64_t begin, int64_t end) { left_out += step_kernels().adamw(adam, begin, end); });
    count_skipped(guards, left_out);
  }
}

STABLE_TORCH_LIBRARY_IMPL(lowrank, CPU, library) {
  library.impl("galore_step.tensor", TORCH_BOX(&step_tensor<Galore>));
  library.impl("galore_step", TORCH_BOX(&step_plain<Galore>));
  library.impl("galore_step.list", TORCH_BOX(&step_list<Galore>));
  library.impl("subspace_step.tensor", TORCH_BOX(&step_tensor<Subspace>));
  library.impl("subspace_step", TORCH_BOX(&step_plain<Subspace>));
  library.impl("subspace_step.list", TORCH_BOX(&step_list<Subspace>));
  library.impl("adamw_step", TORCH_BOX(&adamw_step));
}

}  // namespace
}  // namespace lowrank
