// torch.ops.lowrank on CUDA: channel norms. The products are Triton's.
#include "../projection.h"

#include "tensors.h"

namespace lowrank {
namespace {

Tensor channel_norms(const Tensor& grad, bool left) {
  expect_matrix("channel_norms", "grad", grad);
  const int64_t m = grad.size(0), n = grad.size(1);
  const DeviceGuard guard(grad.get_device_index());
  const Tensor norms = empty({left ? n : m}, place_of(grad));
  const auto launch = left ? launch_column_norms : launch_row_norms;
  STD_CUDA_CHECK(launch(storage(grad), grad.data_ptr(), static_cast<float*>(norms.data_ptr()), m, n, current_stream(grad)));
  return norms;
}

STABLE_TORCH_LIBRARY_IMPL(lowrank, CUDA, library) { library.impl("channel_norms", TORCH_BOX(&channel_norms)); }

}  // namespace
}  // namespace lowrank
