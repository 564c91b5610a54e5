// torch.ops.lowrank on CUDA: fp32 values into weights, rounded stochastically.
#include "../rounding.h"

#include "tensors.h"

namespace lowrank {
namespace {

void round_stochastic(const Tensor& param, const Tensor& values, int64_t seed, const Tensor& step, int64_t parameter,
                      int64_t offset) {
  check_round_stochastic(param, values, step, parameter, offset);
  const DeviceGuard guard(param.get_device_index());
  const Rounding rounding{true, {uint64_t(seed), 0, uint32_t(parameter)}, uint64_t(offset)};
  STD_CUDA_CHECK(launch_round(storage(param), param.data_ptr(), static_cast<const float*>(values.data_ptr()), param.numel(),
                              rounding, number(step), current_stream(param)));
}

STABLE_TORCH_LIBRARY_IMPL(lowrank, CUDA, library) { library.impl("round_stochastic_", TORCH_BOX(&round_stochastic)); }

}  // namespace
}  // namespace lowrank
