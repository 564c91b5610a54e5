// torch.ops.lowrank on CUDA: NF4 weights. The linear layer is Triton's.
#include "../nf4.h"

#include "../../cuda/nf4.h"
#include "tensors.h"

namespace lowrank {
namespace {

using torch::headeronly::ScalarType;

std::tuple<Tensor, Tensor> quantize_nf4(const Tensor& weight, int64_t group_size) {
  check_quantize_nf4(weight, group_size);
  const int64_t m = weight.size(0), n = weight.size(1);
  const DeviceGuard guard(weight.get_device_index());
  const Place place = place_of(weight);
  const Tensor packed = empty({m, (n + 1) / 2}, place, aoti_torch_dtype_uint8());
  const Tensor absmax = empty({m, (n + group_size - 1) / group_size}, place);
  STD_CUDA_CHECK(
      launch_quantize_nf4(storage(weight), weight.data_ptr(), as_nf4(packed, absmax, n, group_size), m, current_stream(weight)));
  return {packed, absmax};
}

Tensor dequantize_nf4(const Tensor& packed, const Tensor& absmax, int64_t n, int64_t group_size, std::optional<ScalarType> dtype) {
  const int32_t type = dtype ? int32_t(*dtype) : aoti_torch_dtype_float32();
  check_dequantize_nf4(packed, absmax, n, group_size, type);
  const DeviceGuard guard(packed.get_device_index());
  const Tensor out = empty({packed.size(0), n}, place_of(packed), type);
  STD_CUDA_CHECK(launch_dequantize_nf4(storage(out), as_nf4(packed, absmax, n, group_size), out.data_ptr(), packed.size(0),
                                       current_stream(packed)));
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(lowrank, CUDA, library) {
  library.impl("quantize_nf4", TORCH_BOX(&quantize_nf4));
  library.impl("dequantize_nf4", TORCH_BOX(&dequantize_nf4));
}

}  // namespace
}  // namespace lowrank
