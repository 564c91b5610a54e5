#include "products.h"

namespace lowrank {

void project_into(const Tensor& r, const Tensor& grad, const Tensor& basis, bool left, Scratch& scratch) {
  if (grad.numel() == 0) {
    std::fill_n(data<float>(r), r.numel(), 0.0f);
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
