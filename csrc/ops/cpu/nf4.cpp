// torch.ops.lowrank on the CPU: NF4 weights.
#include "coded.h"

namespace lowrank {
namespace {

Tensor dequantize_nf4(const Tensor& packed, const Tensor& absmax, int64_t n, int64_t group_size, std::optional<ScalarType> dtype) {
  return dequantize<Nf4Coding>(packed, absmax, n, group_size, dtype);
}

Tensor nf4_linear_backward(const Tensor& grad_out, const Tensor& packed, const Tensor& absmax, int64_t n, int64_t group_size) {
  return linear_backward<Nf4Coding>(grad_out, packed, absmax, n, group_size);
}

STABLE_TORCH_LIBRARY_IMPL(lowrank, CPU, library) {
  library.impl("quantize_nf4", TORCH_BOX(&quantize<Nf4Coding>));
  library.impl("dequantize_nf4", TORCH_BOX(&dequantize_nf4));
  library.impl("nf4_linear", TORCH_BOX(&linear<Nf4Coding>));
  library.impl("nf4_linear_backward", TORCH_BOX(&nf4_linear_backward));
}

}  // namespace
}  // namespace lowrank
