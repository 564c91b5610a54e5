// torch.ops.lowrank on the CPU: fp32 values into weights, rounded stochastically.
#include "../rounding.h"

#include "tensors.h"

namespace lowrank {
namespace {

void round_stochastic(const Tensor& param, const Tensor& values, int64_t seed, const Tensor& step, int64_t parameter,
                      int64_t offset) {
  check_round_stochastic(param, values, step, parameter, offset);
  const Rounding rounding{true, {uint64_t(seed), counter_step(read_number(step)), uint32_t(parameter)}, uint64_t(offset)};
  parallel(param.numel(), 1, [&](int64_t begin, int64_t end) {
    store_kernels().round(storage(param), data<void>(param), data<float>(values), rounding, begin, end);
  });
}

STABLE_TORCH_LIBRARY_IMPL(lowrank, CPU, library) { library.impl("round_stochastic_", TORCH_BOX(&round_stochastic)); }

}  // namespace
}  // namespace lowrank
