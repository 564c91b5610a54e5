// torch.ops.lowrank on CUDA: NF4 weights.
#include "coded.h"

namespace lowrank {
namespace {

Tensor dequantize_nf4(const Tensor& packed, const Tensor& absmax, int64_t n, int64_t group_size, std::optional<ScalarType> dtype) {
  return dequantize<Nf4Coding>(packed, absmax, n, group_size, dtype);
}

STABLE_TORCH_LIBRARY_IMPL(lowrank, CUDA, library) {
  library.impl("quantize_nf4", TORCH_BOX(&quantize<Nf4Coding>));
  library.impl("dequantize_nf4", TORCH_BOX(&dequantize_nf4));
}

}  // namespace
}  // namespace lowrank
