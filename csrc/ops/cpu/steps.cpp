// torch.ops.lowrank on the CPU: AdamW.
#include "../steps.h"

#include "../../cpu/steps.h"
#include "hyper.h"

namespace lowrank {
namespace {

void adamw_step(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                const Tensors& steps, const Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
                bool stochastic, int64_t seed, const std::vector<int64_t>& parameters, const std::vector<int64_t>& offsets,
                const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                const std::optional<Tensor>& skipped) {
  const Guards guards{grad_scale, found_inf, skipped};
  const Draws draws{stochastic, seed, parameters, offsets};
  check_adamw_step(params, grads, exp_avgs, exp_avg_sqs, steps, lr, draws, guards);
  const double rate = read_number(lr);
  if (is_no_op(guards)) return;
  const Hyper hyper{beta1, beta2, eps, weight_decay, 1.0};
  for (size_t i = 0; i < params.size(); ++i) {
    const double step = count_of(steps[i], true);
    const AdamW adam{storage(params[i]),    storage(grads[i]),        data<void>(params[i]),
                     data<void>(grads[i]),  data<float>(exp_avgs[i]), data<float>(exp_avg_sqs[i]),
                     grad_scale_of(guards), hyper.at(step, rate),     rounding_of(draws, i, step)};
    std::atomic<int64_t> left_out = 0;
    parallel(params[i].numel(), 1, [&](int64_t begin, int64_t end) { left_out += step_kernels().adamw(adam, begin, end); });
    count_skipped(guards, left_out);
  }
}

STABLE_TORCH_LIBRARY_IMPL(lowrank, CPU, library) { library.impl("adamw_step", TORCH_BOX(&adamw_step)); }

}  // namespace
}  // namespace lowrank
