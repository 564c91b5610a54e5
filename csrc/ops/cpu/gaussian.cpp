// torch.ops.lowrank on the CPU: a Gaussian basis from its seed, and products with it.
#include "gaussian.h"

#include "../gaussian.h"

namespace lowrank {
namespace {

// Panels of 512 KiB, in whole groups of rows.
constexpr int64_t kPanelElements = 1 << 17;

void make_rows(const Matrix& out, const GaussianBasis& basis, int64_t first, int64_t last) {
  if (first == last) return;
  const int64_t low = first / kGroup, high = (last - 1) / kGroup + 1;
  parallel(high - low, kGroup * basis.rank,
           [&](int64_t begin, int64_t end) { gaussian_kernels().rows(out, basis, first, last, low + begin, low + end); });
}

// Calls f(panel, row, rows) on panels of the basis; `row` counts from the first.
template <class F>
void for_panels(const GaussianBasis& basis, int64_t first, int64_t d, Scratch& scratch, const F& f) {
  const int64_t high = std::max<int64_t>(kGroup, kPanelElements / basis.rank / kGroup * kGroup);
  for (int64_t begin = first; begin < first + d;) {
    // Panels end where groups do.
    const int64_t end = std::min(first + d, begin / kGroup * kGroup + high);
    const Tensor panel = scratch.matrix(end - begin, basis.rank);
    make_rows({DType::f32, data<void>(panel), basis.rank}, basis, begin, end);
    f(panel, begin - first, end - begin);
    begin = end;
  }
}

void basis_rows(const Tensor& out, int64_t seed, int64_t step, int64_t parameter, int64_t first) {
  check_gaussian_basis("gaussian_basis_", out, first);
  if (out.numel() == 0) return;
  const int64_t rank = out.size(1);
  make_rows({storage(out), data<void>(out), rank}, gaussian_basis(seed, step, parameter, rank), first, first + out.size(0));
}

Tensor project(const Tensor& grad, int64_t rank, bool left, int64_t seed, int64_t step, int64_t parameter, int64_t first) {
  check_gaussian_project("gaussian_project", grad, rank, first);
  const Tensor r = empty(left ? Shape{rank, grad.size(1)} : Shape{grad.size(0), rank});
  Workspace work;
  gaussian_project_into(r, grad, gaussian_basis(seed, step, parameter, rank), first, left, work);
  return r;
}

void back_project(const Tensor& param, const Tensor& x, double alpha, double beta, bool left, int64_t seed, int64_t step,
                  int64_t parameter, int64_t first) {
  check_gaussian_back_project("gaussian_back_project_", param, x, left, first);
  const int64_t m = param.size(0), n = param.size(1);
  if (m == 0 || n == 0) return;
  const GaussianBasis basis = gaussian_basis(seed, step, parameter, x.size(left ? 0 : 1));
  Workspace work;
  for_panels(basis, first, left ? m : n, work.basis, [&](const Tensor& panel, int64_t row, int64_t rows) {
    if (left) {
      back_project_into(part(param, row, 0, rows, n), x, panel, left, beta, alpha, nullptr, work);
    } else if (storage(param) == DType::f32) {
      const Tensor w = part(param, 0, row, m, rows);
      STABLE_TORCH_ERROR_CODE_CHECK(
          aoti_torch_cpu_addmm_out(w.get(), w.get(), x.get(), transposed(panel, 0, rows).get(), beta, alpha));
    } else {
      for_tiles(m, rows, [&](int64_t i, int64_t j, int64_t high, int64_t wide) {
        const Tensor update = work.tile.matrix(high, wide);
        multiply(update, part(x, i, 0, high, x.size(1)), transposed(panel, j, wide));
        const Matrix w{storage(param), data<char>(param) + (i * n + row + j) * int64_t(param.element_size()), n};
        const float* delta = data<float>(update);
        parallel(high, wide, [&](int64_t begin, int64_t end) {
          store_kernels().apply(w, delta, nullptr, nullptr, wide, float(beta), float(alpha), {}, begin, end);
        });
      });
    }
  });
}

}  // namespace

void gaussian_project_into(const Tensor& r, const Tensor& grad, const GaussianBasis& basis, int64_t first, bool left,
                           Workspace& work) {
  if (r.numel() == 0) return;
  const int64_t m = grad.size(0), n = grad.size(1);
  if (grad.numel() == 0) {
    std::fill_n(data<float>(r), r.numel(), 0.0f);
    return;
  }
  for_panels(basis, first, left ? m : n, work.basis, [&](const Tensor& panel, int64_t row, int64_t rows) {
    const int64_t top = left ? row : 0, side = left ? 0 : row, high = left ? rows : m, wide = left ? n : rows;
    if (storage(grad) == DType::f32) {
      const Tensor g = part(grad, top, side, high, wide);
      left ? multiply(r, transposed(panel, 0, rows), g, row > 0) : multiply(r, g, panel, row > 0);
      return;
    }
    for_tiles(high, wide, [&](int64_t i, int64_t j, int64_t tall, int64_t broad) {
      const Tensor g = widened(grad, top + i, side + j, tall, broad, work.tile);
      if (left) {
        multiply(part(r, 0, j, r.size(0), broad), transposed(panel, i, tall), g, row > 0 || i > 0);
      } else {
        multiply(part(r, i, 0, tall, r.size(1)), g, part(panel, j, 0, broad, r.size(1)), row > 0 || j > 0);
      }
    });
  });
}

namespace {

STABLE_TORCH_LIBRARY_IMPL(lowrank, CPU, library) {
  library.impl("gaussian_basis_", TORCH_BOX(&basis_rows));
  library.impl("gaussian_project", TORCH_BOX(&project));
  library.impl("gaussian_back_project_", TORCH_BOX(&back_project));
}

}  // namespace
}  // namespace lowrank
