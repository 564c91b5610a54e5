// torch.ops.lowrank on CUDA: fused optimizer steps.
#include "../steps.h"

#include "tensors.h"

namespace lowrank {
namespace {

void adamw_step(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                const Tensors& steps, const Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
                const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                const std::optional<Tensor>& skipped) {
  const Guards guards{grad_scale, found_inf, skipped};
  check_adamw_step(params, grads, exp_avgs, exp_avg_sqs, steps, lr, guards);
  if (params.empty()) return;
  const AdamWScalars scalars = adamw_scalars(beta1, beta2, eps, weight_decay, lr, guards);
  const DeviceGuard guard(params[0].get_device_index());
  const cudaStream_t stream = current_stream(params[0]);
  launch_lists<AdamWList>(
      params.size(), [&](size_t i) { return std::pair{storage(params[i]), storage(grads[i])}; },
      [&](size_t i) {
        return AdamWList::Item{params[i].data_ptr(),
                               grads[i].data_ptr(),
                               static_cast<float*>(exp_avgs[i].data_ptr()),
                               static_cast<float*>(exp_avg_sqs[i].data_ptr()),
                               static_cast<float*>(steps[i].data_ptr()),
                               params[i].numel()};
      },
      [&](const auto& dtypes, const AdamWList& list) {
        STD_CUDA_CHECK(launch_advance(StepList::of(list), scalars.found_inf, stream));
        STD_CUDA_CHECK(launch_adamw(dtypes.first, dtypes.second, list, scalars, stream));
      });
}

STABLE_TORCH_LIBRARY_IMPL(lowrank, CUDA, library) { library.impl("adamw_step", TORCH_BOX(&adamw_step)); }

}  // namespace
}  // namespace lowrank
