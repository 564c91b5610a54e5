#include "products.h"

#include "../../cpu/gemm.h"

namespace lowrank {
namespace {

// Where ours beats torch's GEMM, which is made for square matrices, by measurement (docs/kernels/fp32-products.md): few columns
// of a matrix that is larger than the caches.
bool projects_thin(const Tensor& grad, int64_t rank) {
  constexpr int64_t most_columns = 192, least_elements = 1 << 20;
  return gemm_kernels().fast && storage(grad) == DType::f32 && rank <= most_columns && grad.numel() >= least_elements;
}

}  // namespace

void project_into(const Tensor& r, const Tensor& grad, const Tensor& basis, bool left, Scratch& scratch) {
  if (grad.numel() == 0) {
    std::fill_n(data<float>(r), r.numel(), 0.0f);
  } else if (projects_thin(grad, basis.size(1))) {
    const int64_t m = grad.size(0), n = grad.size(1), unit = left ? kGemmColumns : kGemmRows, channels = left ? n : m;
    const Projection p{data<float>(grad), m, n, data<float>(basis), basis.size(1), data<float>(r)};
    parallel((channels + unit - 1) / unit, unit * (left ? m : n), [&](int64_t begin, int64_t end) {
      (left ? gemm_kernels().project_columns : gemm_kernels().project_rows)(p, begin * unit, std::min(end * unit, channels));
    });
  } else if (storage(grad) == DType::f32) {
    left ? multiply(r, transposed(basis, 0, basis.size(0)), grad) : multiply(r, grad, basis);
  } else {
    for_tiles(grad.size(0), grad.size(1), [&](int64_t i, int64_t j, int64_t rows, int64_t columns) {
      const Tensor g = widened(grad, i, j, rows, columns, scratch);
      if (left) {
        multiply(part(r, 0, j, r.size(0), columns), transposed(basis, i, rows), g, i > 0);
      } else {
        multiply(part(r, i, 0, rows, r.size(1)), g, part(basis, j, 0, columns, basis.size(1)), j > 0);
      }
    });
  }
}

void back_project_into(const Tensor& param, const Tensor& x, const Tensor& basis, bool left, double beta, double alpha,
                       const uint8_t* ok, Scratch& scratch) {
  const int64_t m = param.size(0), n = param.size(1);
  if (storage(param) == DType::f32 && ok == nullptr) {
    if (m == 0 || n == 0) return;
    const Tensor basis_t = transposed(basis, 0, basis.size(0));
    multiply_into(param, left ? basis : x, left ? x : basis_t, beta, alpha);
    return;
  }
  apply_tiles(param, left, beta, alpha, ok, scratch, [&](const Tensor& update, int64_t i, int64_t j) {
    const int64_t rows = update.size(0), columns = update.size(1);
    if (left) {
      multiply(update, part(basis, i, 0, rows, basis.size(1)), part(x, 0, j, x.size(0), columns));
    } else {
      multiply(update, part(x, i, 0, rows, x.size(1)), transposed(basis, j, columns));
    }
  });
}

}  // namespace lowrank
