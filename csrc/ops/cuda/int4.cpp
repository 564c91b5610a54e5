// torch.ops.lowrank on CUDA: bases in INT4. The products are Triton's.
#include "../int4.h"

#include "../../cuda/int4.h"
#include "tensors.h"

namespace lowrank {
namespace {

std::tuple<Tensor, Tensor, Tensor> quantize(const Tensor& basis, int64_t group_size) {
  check_quantize_int4("quantize_int4", basis, group_size);
  const DeviceGuard guard(basis.get_device_index());
  const int64_t d = basis.size(0), r = basis.size(1);
  const Shape scales = {r, (d + group_size - 1) / group_size};
  const Place place = place_of(basis);
  const Tensor packed = empty({r, (d + 1) / 2}, place, aoti_torch_dtype_uint8());
  const Tensor scale = empty(scales, place), offset = empty(scales, place);
  STD_CUDA_CHECK(
      launch_quantize_int4(storage(basis), basis.data_ptr(), as_int4(packed, scale, offset, d, group_size), current_stream(basis)));
  return {packed, scale, offset};
}

Tensor dequantize(const Tensor& packed, const Tensor& scale, const Tensor& offset, int64_t d, int64_t group_size) {
  check_dequantize_int4("dequantize_int4", packed, scale, offset, d, group_size);
  const DeviceGuard guard(packed.get_device_index());
  const Tensor basis = empty({d, packed.size(0)}, place_of(packed));
  STD_CUDA_CHECK(launch_dequantize_int4(as_int4(packed, scale, offset, d, group_size), static_cast<float*>(basis.data_ptr()),
                                        current_stream(packed)));
  return basis;
}

STABLE_TORCH_LIBRARY_IMPL(lowrank, CUDA, library) {
  library.impl("quantize_int4", TORCH_BOX(&quantize));
  library.impl("dequantize_int4", TORCH_BOX(&dequantize));
}

}  // namespace
}  // namespace lowrank
