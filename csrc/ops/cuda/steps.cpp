// torch.ops.lowrank on CUDA: fused optimizer steps.
#include <map>

#include "../steps.h"
#include "tensors.h"

namespace lowrank {
namespace {

void adamw_step(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                const Tensors& steps, const Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
                const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                const std::optional<Tensor>& skipped) {
  check_adamw_step(params, grads, exp_avgs, exp_avg_sqs, steps, lr, {grad_scale, found_inf, skipped});
  if (params.empty()) return;
  const AdamWScalars scalars{beta1, beta2, eps, weight_decay, number("adamw_step", "lr", lr), pointer(grad_scale),
                             pointer(found_inf), skipped ? static_cast<int64_t*>(skipped->data_ptr()) : nullptr};
  const DeviceGuard guard(params[0].get_device_index());
  const cudaStream_t stream = current_stream(params[0]);

  std::map<std::pair<DType, DType>, AdamWList> lists;
  const auto flush = [&](DType w, DType g, AdamWList& list) {
    STD_CUDA_CHECK(launch_advance(StepList::of(list), scalars.found_inf, stream));
    STD_CUDA_CHECK(launch_adamw(w, g, list, scalars, stream));
    list.count = 0;
  };
  for (size_t i = 0; i < params.size(); ++i) {
    const DType w = storage(params[i]), g = storage(grads[i]);
    AdamWList& list = lists[{w, g}];
    list.items[list.count++] = {params[i].data_ptr(),
                                grads[i].data_ptr(),
                                static_cast<float*>(exp_avgs[i].data_ptr()),
                                static_cast<float*>(exp_avg_sqs[i].data_ptr()),
                                static_cast<float*>(steps[i].data_ptr()),
                                params[i].numel()};
    if (list.count == AdamWList::kMost) flush(w, g, list);
  }
  for (auto& [dtypes, list] : lists)
    if (list.count > 0) flush(dtypes.first, dtypes.second, list);
}

STABLE_TORCH_LIBRARY_IMPL(lowrank, CUDA, library) {
  library.impl("adamw_step", TORCH_BOX(&adamw_step));
}

}  // namespace
}  // namespace lowrank
