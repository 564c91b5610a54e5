// torch.ops.lowrank on the CPU: a weight that is low-rank plus sparse.
#include "../scatter_add.h"

#include "../../cpu/scatter_add.h"
#include "tensors.h"

namespace lowrank {
namespace {

using torch::headeronly::ScalarType;

// The columns of a row rise and are in [0, n).
void check_columns(const Entries& s, int64_t m, int64_t n) {
  std::atomic<int64_t> first = m * s.count;
  parallel(m, s.count, [&](int64_t begin, int64_t end) {
    const int64_t at = scatter_add_kernels().misplaced(s, n, begin, end);
    int64_t least = first;
    while (at >= 0 && at < least && !first.compare_exchange_weak(least, at)) {
    }
  });
  if (first == m * s.count) return;
  const int64_t i = first / s.count, j = first % s.count;
  fail("scatter_add_product", "columns[", i, ", ", j, "] must be in [", j > 0 ? s.columns[first - 1] + int64_t(1) : 0, ", ", n,
       "), got ", s.columns[first]);
}

Tensor scatter_add_product(const Tensor& b, const Tensor& a, const Tensor& values, const Tensor& columns, double scale,
                           std::optional<ScalarType> dtype) {
  const int32_t type = dtype ? int32_t(*dtype) : dtype_of(b);
  check_scatter_add_product(b, a, values, columns, type);
  const int64_t m = b.size(0), r = b.size(1), n = a.size(1);
  const Entries s{storage(values), data<void>(values), data<int32_t>(columns), values.size(1)};
  check_columns(s, m, n);
  const Tensor out = empty({m, n}, type);
  Scratch wide_b, wide_a, tile;
  const Tensor left = as_fp32(b, wide_b), right = as_fp32(a, wide_a);
  const auto merge = [&](const Tensor& product, double factor, int64_t i, int64_t j) {
    const int64_t wide = product.size(1);
    const Matrix w{storage(out), data<char>(out) + (i * n + j) * int64_t(out.element_size()), n};
    parallel(product.size(0), wide, [&](int64_t begin, int64_t end) {
      scatter_add_kernels().merge(data<float>(product), float(factor), s, i, j, w, wide, begin, end);
    });
  };
  // BLAS makes no product that it scales by 0, and so no NaN of it.
  if (storage(out) == DType::f32 && scale != 0 && out.numel() > 0) {
    multiply_into(out, left, right, 0, scale);
    merge(out, 1, 0, 0);
    return out;
  }
  for_tiles(m, n, [&](int64_t i, int64_t j, int64_t rows, int64_t wide) {
    const Tensor product = tile.matrix(rows, wide);
    multiply(product, part(left, i, 0, rows, r), part(right, 0, j, r, wide));
    merge(product, scale, i, j);
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(lowrank, CPU, library) { library.impl("scatter_add_product", TORCH_BOX(&scatter_add_product)); }

}  // namespace
}  // namespace lowrank
