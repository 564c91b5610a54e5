// torch.ops.lowrank on the CPU: INT8 weights.
#include "../int8.h"

#include "int8_products.h"

namespace lowrank {
namespace {

using torch::headeronly::ScalarType;

std::tuple<Tensor, Tensor> quantize_int8(const Tensor& weight, int64_t group_size) {
  check_quantize_int8(weight, group_size);
  const int64_t m = weight.size(0), n = weight.size(1);
  const Tensor codes = empty({m, n}, aoti_torch_dtype_int8()), scale = empty({m, (n + group_size - 1) / group_size});
  const Matrix dense{storage(weight), data<void>(weight), n};
  const Int8Matrix w = as_int8(codes, scale, group_size);
  parallel(m * w.groups(), group_size,
           [&](int64_t begin, int64_t end) { int8_kernels().quantize(dense, w, {0, 0, m, n}, begin, end); });
  return {codes, scale};
}

Tensor dequantize_int8(const Tensor& codes, const Tensor& scale, int64_t group_size, std::optional<ScalarType> dtype) {
  const int32_t type = dtype ? int32_t(*dtype) : aoti_torch_dtype_float32();
  check_dequantize_int8(codes, scale, group_size, type);
  const int64_t m = codes.size(0), n = codes.size(1);
  const Tensor out = empty({m, n}, type);
  dequantize_int8_tile(as_int8(codes, scale, group_size), {0, 0, m, n}, {storage(out), data<void>(out), n});
  return out;
}

void update(const Tensor& codes, const Tensor& scale, const Tensor& update, double alpha, double decay, int64_t seed, uint32_t step,
            int64_t parameter, int64_t offset, int64_t group_size) {
  const Int8Step at{{float(alpha), float(decay)}, {uint64_t(seed), step, uint32_t(parameter)}, uint64_t(offset)};
  update_int8_tile(as_int8(codes, scale, group_size), {0, 0, codes.size(0), codes.size(1)},
                   {storage(update), data<void>(update), codes.size(1)}, at);
}

void int8_update_plain(const Tensor& codes, const Tensor& scale, const Tensor& dense, double alpha, double decay, int64_t seed,
                       int64_t step, int64_t parameter, int64_t offset, int64_t group_size) {
  check_int8_update(codes, scale, dense, group_size);
  check_int8_numbers("int8_update_", alpha, decay, step);
  expect_stream("int8_update_", parameter, offset);
  update(codes, scale, dense, alpha, decay, seed, uint32_t(step), parameter, offset, group_size);
}

void int8_update_tensor(const Tensor& codes, const Tensor& scale, const Tensor& dense, const Tensor& alpha, const Tensor& decay,
                        int64_t seed, const Tensor& step, int64_t parameter, int64_t offset, int64_t group_size) {
  constexpr const char* op = "int8_update_";
  check_int8_update(codes, scale, dense, group_size);
  const std::pair<const char*, const Tensor&> numbers[] = {{"alpha", alpha}, {"decay", decay}, {"step", step}};
  double values[3];
  for (int i = 0; i < 3; ++i) {
    expect_number(op, numbers[i].first, numbers[i].second, place_of(codes));
    values[i] = read_number(numbers[i].second);
  }
  expect_stream("int8_update_", parameter, offset);
  update(codes, scale, dense, values[0], values[1], seed, counter_step(values[2]), parameter, offset, group_size);
}

// Rows of an fp32 matrix into `to`, of any type.
void narrow(const Tensor& from, const Matrix& to) {
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

Shape with_last(const Tensor& t, int64_t last) {
  Shape shape(t.sizes().begin(), t.sizes().end());
  shape.back() = last;
  return shape;
}

Tensor int8_linear(const Tensor& x, const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& bias,
                   int64_t group_size) {
  check_int8_linear(x, codes, scale, bias, group_size);
  const int64_t m = codes.size(0), n = codes.size(1);
  const Int8Matrix w = as_int8(codes, scale, group_size);
  const Tensor out = empty(with_last(x, m), dtype_of(x));
  Scratch panel, wide_bias;
  std::optional<Tensor> b;
  if (bias) b = as_fp32(view(*bias, 0, 1, m, m, 1), wide_bias);
  // Whole rows of W: a panel gives whole sums.
  by_panels(x, out, n, m, std::max<int64_t>(1, kPanelElements / std::max<int64_t>(1, n)),
            [&](const Tensor& y, const Tensor& a, int64_t first, int64_t count) {
              const Tensor dense = panel.matrix(count, n);
              dequantize_int8_tile(w, {first, 0, count, n}, {DType::f32, data<float>(dense), n});
              const Tensor dense_t = transposed(dense, 0, count);
              if (!b) return multiply(y, a, dense_t);
              const Tensor start = view(*b, first, y.size(0), count, 0, 1);
              STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(y.get(), start.get(), a.get(), dense_t.get(), 1, 1));
            });
  return out;
}

Tensor int8_linear_backward(const Tensor& grad_out, const Tensor& codes, const Tensor& scale, int64_t group_size) {
  check_int8_linear_backward(grad_out, codes, scale, group_size);
  const int64_t m = codes.size(0), n = codes.size(1);
  const Int8Matrix w = as_int8(codes, scale, group_size);
  const Tensor out = empty(with_last(grad_out, n), dtype_of(grad_out));
  Scratch panel;
  // Whole columns of W, in whole groups.
  const int64_t groups = std::max<int64_t>(1, kPanelElements / std::max<int64_t>(1, m * group_size));
  by_panels(grad_out, out, m, n, groups * group_size, [&](const Tensor& dx, const Tensor& dy, int64_t first, int64_t count) {
    const Tensor dense = panel.matrix(m, count);
    dequantize_int8_tile(w, {0, first, m, count}, {DType::f32, data<float>(dense), count});
    multiply(dx, dy, dense);
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(lowrank, CPU, library) {
  library.impl("quantize_int8", TORCH_BOX(&quantize_int8));
  library.impl("dequantize_int8", TORCH_BOX(&dequantize_int8));
  library.impl("int8_update_.tensor", TORCH_BOX(&int8_update_tensor));
  library.impl("int8_update_", TORCH_BOX(&int8_update_plain));
  library.impl("int8_linear", TORCH_BOX(&int8_linear));
  library.impl("int8_linear_backward", TORCH_BOX(&int8_linear_backward));
}

}  // namespace
}  // namespace lowrank
