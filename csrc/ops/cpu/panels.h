// The linear layer on a quantized weight: products with panels of it, dequantized to fp32 one at a time.
#pragma once

#include "int8_products.h"

namespace lowrank {

// Rows of an fp32 matrix into `to`, of any type.
inline void narrow(const Tensor& from, const Matrix& to) {
  const int64_t rows = from.size(0), columns = from.size(1);
  parallel(rows, columns, [&](int64_t begin, int64_t end) {
    store_kernels().apply(to, data<float>(from), nullptr, nullptr, columns, 0.0f, 1.0f, {}, begin, end);
  });
}

// out (t, out_width) <- a (t, in_width) times the tiles of the weight, one panel of fp32 at a time. Calls product(y, a, first,
// count, row, rows) for `count` outputs from `first` on; y is fp32.
template <class Product>
void by_panels(const Tensor& a, const Tensor& out, int64_t in_width, int64_t out_width, int64_t step, const Product& product) {
  const int64_t t = in_width > 0 ? a.numel() / in_width : out.numel() / std::max<int64_t>(1, out_width);
  if (out.numel() == 0) return;
  const bool direct = storage(a) == DType::f32;
  const int64_t high = direct ? t : std::min(t, kTileSide);
  Scratch wide, result;
  for (int64_t row = 0; row < t; row += high) {
    const int64_t rows = std::min(high, t - row);
    const Tensor flat = view(a, 0, t, in_width, in_width, 1);
    const Tensor rows_in = direct ? flat : widened(flat, row, 0, rows, in_width, wide);
    for (int64_t first = 0; first < out_width; first += step) {
      const int64_t count = std::min(step, out_width - first), at = row * out_width + first;
      if (direct) {
        product(view(out, at, rows, count, out_width, 1), rows_in, first, count);
      } else {
        const Tensor y = result.matrix(rows, count);
        product(y, rows_in, first, count);
        narrow(y, {storage(out), data<char>(out) + at * int64_t(out.element_size()), out_width});
      }
    }
  }
}

inline Shape with_last(const Tensor& t, int64_t last) {
  Shape shape(t.sizes().begin(), t.sizes().end());
  shape.back() = last;
  return shape;
}

// y = x Wᵀ + bias for W (m, n), of which dequantize(tile, dense) makes a tile in fp32.
template <class Dequantize>
Tensor linear_by_panels(const Tensor& x, int64_t m, int64_t n, const std::optional<Tensor>& bias, const Dequantize& dequantize) {
  const Tensor out = empty(with_last(x, m), dtype_of(x));
  Scratch panel, wide_bias;
  std::optional<Tensor> b;
  if (bias) b = as_fp32(view(*bias, 0, 1, m, m, 1), wide_bias);
  // Whole rows of W: a panel gives whole sums.
  by_panels(x, out, n, m, std::max<int64_t>(1, kPanelElements / std::max<int64_t>(1, n)),
            [&](const Tensor& y, const Tensor& a, int64_t first, int64_t count) {
              const Tensor dense = panel.matrix(count, n);
              dequantize({first, 0, count, n}, {DType::f32, data<float>(dense), n});
              const Tensor dense_t = transposed(dense, 0, count);
              if (!b) return multiply(y, a, dense_t);
              const Tensor start = view(*b, first, y.size(0), count, 0, 1);
              STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(y.get(), start.get(), a.get(), dense_t.get(), 1, 1));
            });
  return out;
}

// dx = dy W
template <class Dequantize>
Tensor linear_backward_by_panels(const Tensor& grad_out, int64_t m, int64_t n, int64_t group_size, const Dequantize& dequantize) {
  const Tensor out = empty(with_last(grad_out, n), dtype_of(grad_out));
  Scratch panel;
  // Whole columns of W, in whole groups.
  const int64_t groups = std::max<int64_t>(1, kPanelElements / std::max<int64_t>(1, m * group_size));
  by_panels(grad_out, out, m, n, groups * group_size, [&](const Tensor& dx, const Tensor& dy, int64_t first, int64_t count) {
    const Tensor dense = panel.matrix(m, count);
    dequantize({0, first, m, count}, {DType::f32, data<float>(dense), count});
    multiply(dx, dy, dense);
  });
  return out;
}

}  // namespace lowrank
