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

// In fp32; the basis too.
void project_dense(const Tensor& r, const Tensor& grad, const Tensor& basis, bool left, Scratch& scratch) {
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

}  // namespace

void project_into(const Tensor& r, const Tensor& grad, const Basis& basis, bool left, Workspace& work) {
  if (const Int4* int4 = std::get_if<Int4>(&basis)) {
    project_int4_into(r, grad, *int4, left, work.basis, work.tile);
  } else {
    project_dense(r, grad, std::get<Tensor>(basis), left, work.tile);
  }
}

void back_project_tile(const Tensor& w, int64_t row, int64_t column, const Tensor& x, const Basis& basis, bool left, double beta,
                       double alpha, Workspace& work) {
  if (const Int4* int4 = std::get_if<Int4>(&basis)) {
    back_project_int4_tile(w, row, column, x, *int4, left, beta, alpha, work.basis);
    return;
  }
  const Tensor& b = std::get<Tensor>(basis);
  const int64_t rows = w.size(0), columns = w.size(1), r = b.size(1);
  if (left) {
    multiply_into(w, part(b, row, 0, rows, r), part(x, 0, column, r, columns), beta, alpha);
  } else {
    multiply_into(w, part(x, row, 0, rows, r), transposed(b, column, columns), beta, alpha);
  }
}

void back_project_into(const Tensor& param, const Tensor& x, const Basis& basis, bool left, double beta, double alpha,
                       const uint8_t* ok, Workspace& work, const Rounding& rounding) {
  if (param.numel() == 0) return;
  if (storage(param) == DType::f32 && ok == nullptr) {
    back_project_tile(param, 0, 0, x, basis, left, beta, alpha, work);
    return;
  }
  apply_tiles(param, left, beta, alpha, ok, rounding, work.tile, [&](const Tensor& update, int64_t row, int64_t column) {
    back_project_tile(update, row, column, x, basis, left, 0.0, 1.0, work);
  });
}

}  // namespace lowrank
