// torch.ops.lowrank on CUDA: fused optimizer steps.
#include "../steps.h"

#include "tensors.h"

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
  if (params.empty()) return;
  const AdamWScalars scalars = adamw_scalars(beta1, beta2, eps, weight_decay, lr, guards);
  const DeviceGuard guard(params[0].get_device_index());
  const cudaStream_t stream = current_stream(params[0]);
  const auto dtypes_of = [&](size_t i) { return std::pair{storage(params[i]), storage(grads[i])}; };
  const auto item = [&](size_t i) {
    return AdamWList::Item{params[i].data_ptr(),
                           grads[i].data_ptr(),
                           static_cast<float*>(exp_avgs[i].data_ptr()),
                           static_cast<float*>(exp_avg_sqs[i].data_ptr()),
                           static_cast<float*>(steps[i].data_ptr()),
                           params[i].numel()};
  };
  const auto launch = [&](const auto& dtypes, const auto& list, auto... seeds) {
    STD_CUDA_CHECK(launch_advance(StepList::of(list), scalars.found_inf, stream));
    STD_CUDA_CHECK(launch_adamw(dtypes.first, dtypes.second, list, scalars, seeds..., stream));
  };
  launch_rounded<AdamWList, DrawnAdamWList>(params.size(), draws, dtypes_of, item, launch);
}

STABLE_TORCH_LIBRARY_IMPL(lowrank, CUDA, library) { library.impl("adamw_step", TORCH_BOX(&adamw_step)); }

}  // namespace
}  // namespace lowrank
