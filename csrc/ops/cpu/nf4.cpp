// torch.ops.lowrank on the CPU: NF4 weights.
#include "../nf4.h"

#include "../../cpu/nf4.h"
#include "panels.h"

namespace lowrank {
namespace {

using torch::headeronly::ScalarType;

void dequantize_tile(const Nf4Matrix& w, const Int8Tile& tile, const Matrix& dense) {
  parallel(tile.rows * ((tile.columns + w.group_size - 1) / w.group_size), w.group_size,
           [&](int64_t begin, int64_t end) { nf4_kernels().dequantize(w, dense, tile, begin, end); });
}

std::tuple<Tensor, Tensor> quantize_nf4(const Tensor& weight, int64_t group_size) {
  check_quantize_nf4(weight, group_size);
  const int64_t m = weight.size(0), n = weight.size(1);
  const Tensor packed = empty({m, (n + 1) / 2}, aoti_torch_dtype_uint8()), absmax = empty({m, (n + group_size - 1) / group_size});
  const Matrix dense{storage(weight), data<void>(weight), n};
  const Nf4Matrix w = as_nf4(packed, absmax, n, group_size);
  parallel(m * w.groups(), group_size,
           [&](int64_t begin, int64_t end) { nf4_kernels().quantize(dense, w, {0, 0, m, n}, begin, end); });
  return {packed, absmax};
}

Tensor dequantize_nf4(const Tensor& packed, const Tensor& absmax, int64_t n, int64_t group_size, std::optional<ScalarType> dtype) {
  const int32_t type = dtype ? int32_t(*dtype) : aoti_torch_dtype_float32();
  check_dequantize_nf4(packed, absmax, n, group_size, type);
  const int64_t m = packed.size(0);
  const Tensor out = empty({m, n}, type);
  dequantize_tile(as_nf4(packed, absmax, n, group_size), {0, 0, m, n}, {storage(out), data<void>(out), n});
  return out;
}

Tensor nf4_linear(const Tensor& x, const Tensor& packed, const Tensor& absmax, const std::optional<Tensor>& bias,
                  int64_t group_size) {
  check_nf4_linear(x, packed, absmax, bias, group_size);
  const int64_t n = x.size(x.dim() - 1);
  const Nf4Matrix w = as_nf4(packed, absmax, n, group_size);
  return linear_by_panels(x, packed.size(0), n, bias,
                          [&](const Int8Tile& tile, const Matrix& dense) { dequantize_tile(w, tile, dense); });
}

Tensor nf4_linear_backward(const Tensor& grad_out, const Tensor& packed, const Tensor& absmax, int64_t n, int64_t group_size) {
  check_nf4_linear_backward(grad_out, packed, absmax, n, group_size);
  const Nf4Matrix w = as_nf4(packed, absmax, n, group_size);
  return linear_backward_by_panels(grad_out, packed.size(0), n, group_size,
                                   [&](const Int8Tile& tile, const Matrix& dense) { dequantize_tile(w, tile, dense); });
}

STABLE_TORCH_LIBRARY_IMPL(lowrank, CPU, library) {
  library.impl("quantize_nf4", TORCH_BOX(&quantize_nf4));
  library.impl("dequantize_nf4", TORCH_BOX(&dequantize_nf4));
  library.impl("nf4_linear", TORCH_BOX(&nf4_linear));
  library.impl("nf4_linear_backward", TORCH_BOX(&nf4_linear_backward));
}

}  // namespace
}  // namespace lowrank
