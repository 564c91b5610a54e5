#include "products.h"

#include "../../cpu/gemm.h"

namespace lowrank {
namespace {

// Where ours beat torch's GEMM, which is made for square matrices, by measurement (docs/kernels/fp32-products.md): few
// columns, or a short depth, of a matrix that is larger than the caches.
bool is_thin(const Tensor& matrix, int64_t rank, int64_t least_rank, int64_t least_elements) {
  constexpr int64_t kThin = 192;
  return gemm_kernels().fast && rank >= least_rank && rank <= kThin && matrix.numel() >= least_elements;
}

bool projects_thin(const Tensor& grad, int64_t rank) { return is_thin(grad, rank, 1, 1 << 20); }

// Other storage than fp32, and channels left out, would need another pass behind torch's.
bool returns_thin(const Tensor& param, int64_t rank, const uint8_t* ok) {
  const bool direct = storage(param) == DType::f32 && ok == nullptr;
  return direct ? is_thin(param, rank, 96, 1 << 23) : is_thin(param, rank, 1, 1 << 20);
}

Matrix matrix_of(const Tensor& t) { return {storage(t), data<void>(t), t.size(1)}; }

}  // namespace

void project_into(const Tensor& r, const Tensor& grad, const Tensor& basis, bool left, Scratch& scratch) {
  if (grad.numel() == 0) {
    std::fill_n(data<float>(r), r.numel(), 0.0f);
  } else if (projects_thin(grad, basis.size(1))) {
    const int64_t m = grad.size(0), n = grad.size(1), unit = left ? kGemmColumns : kGemmRows, channels = left ? n : m;
    const Projection p{matrix_of(grad), m, n, data<float>(basis), basis.size(1), data<float>(r)};
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
  if (returns_thin(param, basis.size(1), ok)) {
    const float *b = data<float>(basis), *low_rank = data<float>(x);
    const BackProjection back{matrix_of(param),     m, n, left ? b : low_rank, left ? low_rank : b, !left, basis.size(1),
                              left ? nullptr : ok, left ? ok : nullptr, float(beta), float(alpha)};
    const int64_t work = back.high * back.wide();
    parallel(back.parts(), work, [&](int64_t begin, int64_t end) { gemm_kernels().back(back, begin, end); });
    return;
  }
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
