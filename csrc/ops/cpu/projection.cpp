// torch.ops.lowrank on the CPU: products with a basis, and channel norms.
#include "../projection.h"

#include "../../cpu/norms.h"
#include "int8_gemm.h"

namespace lowrank {
namespace {

Tensor project(const Tensor& grad, const Tensor& basis, bool left, bool int8_gemm) {
  check_project("project", grad, basis, left);
  const Tensor r = empty(low_rank_shape(grad, basis, left));
  Workspace work;
  if (int8_gemm) {
    project_int8_gemm(r, grad, basis, left, work);
  } else {
    project_into(r, grad, as_fp32(basis, work.basis), left, work);
  }
  return r;
}

void back_project(const Tensor& param, const Tensor& low_rank, const Tensor& basis, double alpha, double beta, bool left,
                  bool int8_gemm) {
  check_back_project("back_project_", param, low_rank, basis, left);
  Workspace work;
  if (int8_gemm) {
    back_project_int8_gemm(param, low_rank, basis, left, beta, alpha, nullptr, {}, work);
  } else {
    back_project_into(param, low_rank, as_fp32(basis, work.basis), left, beta, alpha, nullptr, work);
  }
}

Tensor channel_norms(const Tensor& grad, bool left) {
  expect_matrix("channel_norms", "grad", grad);
  const int64_t m = grad.size(0), n = grad.size(1);
  const Tensor norms = empty({left ? n : m});
  const Matrix g{storage(grad), data<void>(grad), n};
  float* out = data<float>(norms);
  parallel(left ? n : m, left ? m : n, [&](int64_t begin, int64_t end) {
    left ? norm_kernels().columns(g, m, out, begin, end) : norm_kernels().rows(g, n, out, begin, end);
  });
  return norms;
}

STABLE_TORCH_LIBRARY_IMPL(lowrank, CPU, library) {
  library.impl("project", TORCH_BOX(&project));
  library.impl("back_project_", TORCH_BOX(&back_project));
  library.impl("channel_norms", TORCH_BOX(&channel_norms));
}

}  // namespace
}  // namespace lowrank
