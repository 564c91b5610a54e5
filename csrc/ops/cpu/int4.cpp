// torch.ops.lowrank on the CPU: bases in INT4.
#include "../int4.h"

#include "../../cpu/int4.h"
#include "products.h"

namespace lowrank {
namespace {

std::tuple<Tensor, Tensor, Tensor> quantize(const Tensor& basis, int64_t group_size) {
  check_quantize_int4("quantize_int4", basis, group_size);
  const int64_t d = basis.size(0), r = basis.size(1);
  const Shape scales = {r, (d + group_size - 1) / group_size};
  const Tensor packed = empty({r, (d + 1) / 2}, aoti_torch_dtype_uint8()), scale = empty(scales), offset = empty(scales);
  const Int4 to = as_int4(packed, scale, offset, d, group_size);
  const Matrix from{storage(basis), data<void>(basis), r};
  parallel(int4_pieces(to), kVectors * group_size,
           [&](int64_t begin, int64_t end) { int4_kernels().quantize(from, to, begin, end); });
  return {packed, scale, offset};
}

Tensor dequantize(const Tensor& packed, const Tensor& scale, const Tensor& offset, int64_t d, int64_t group_size) {
  check_dequantize_int4("dequantize_int4", packed, scale, offset, d, group_size);
  const Int4 from = as_int4(packed, scale, offset, d, group_size);
  const Tensor basis = empty({d, from.r});
  float* to = data<float>(basis);
  parallel(int4_pieces(from), kVectors * group_size,
           [&](int64_t begin, int64_t end) { int4_kernels().dequantize(from, to, begin, end); });
  return basis;
}

Tensor project(const Tensor& grad, const Tensor& packed, const Tensor& scale, const Tensor& offset, bool left, int64_t group_size) {
  check_project_int4("project_int4", grad, packed, scale, offset, left, group_size);
  const Tensor r = empty(int4_low_rank_shape(grad, packed, left));
  Workspace work;
  project_into(r, grad, as_int4(packed, scale, offset, grad.size(left ? 0 : 1), group_size), left, work);
  return r;
}

void back_project(const Tensor& param, const Tensor& low_rank, const Tensor& packed, const Tensor& scale, const Tensor& offset,
                  double alpha, double beta, bool left, int64_t group_size) {
  check_back_project_int4("back_project_int4_", param, low_rank, packed, scale, offset, left, group_size);
  Workspace work;
  const Int4 basis = as_int4(packed, scale, offset, param.size(left ? 0 : 1), group_size);
  back_project_into(param, low_rank, basis, left, beta, alpha, nullptr, work);
}

STABLE_TORCH_LIBRARY_IMPL(lowrank, CPU, library) {
  library.impl("quantize_int4", TORCH_BOX(&quantize));
  library.impl("dequantize_int4", TORCH_BOX(&dequantize));
  library.impl("project_int4", TORCH_BOX(&project));
  library.impl("back_project_int4_", TORCH_BOX(&back_project));
}

}  // namespace
}  // namespace lowrank
