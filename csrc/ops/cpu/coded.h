// The ops on weights in codes, for each coding C.
#pragma once

#include "../../cpu/int8.h"
#include "../../cpu/nf4.h"
#include "../coded.h"
#include "panels.h"

namespace lowrank {

using torch::headeronly::ScalarType;

inline const CodedKernels<Int8Matrix>& kernels_for(const Int8Matrix&) { return int8_kernels(); }
inline const CodedKernels<Nf4Matrix>& kernels_for(const Nf4Matrix&) { return nf4_kernels(); }

// dense <- the tile, in any type; `dense` points to its first element.
template <class M>
void dequantize_tile(const M& w, const CodedTile& tile, const Matrix& dense) {
  parallel_groups(w, tile, [&](int64_t begin, int64_t end) { kernels_for(w).dequantize(w, dense, tile, begin, end); });
}

template <class C>
std::tuple<Tensor, Tensor> quantize(const Tensor& weight, int64_t group_size) {
  check_quantize<C>(weight, group_size);
  const int64_t m = weight.size(0), n = weight.size(1);
  const Tensor codes = empty(codes_shape<C>(m, n), C::dtype()), scale = empty(scale_shape(m, n, group_size));
  const Matrix dense{storage(weight), data<void>(weight), n};
  const auto w = as_coded<C>(codes, scale, n, group_size);
  const CodedTile whole{0, 0, m, n};
  parallel_groups(w, whole, [&](int64_t begin, int64_t end) { kernels_for(w).quantize(dense, w, whole, begin, end); });
  return {codes, scale};
}

template <class C>
Tensor dequantize(const Tensor& codes, const Tensor& scale, std::optional<int64_t> given, int64_t group_size,
                  std::optional<ScalarType> dtype) {
  const int32_t type = dtype ? int32_t(*dtype) : aoti_torch_dtype_float32();
  const int64_t n = check_dequantize<C>(codes, scale, given, group_size, type), m = codes.size(0);
  const Tensor out = empty({m, n}, type);
  dequantize_tile(as_coded<C>(codes, scale, n, group_size), {0, 0, m, n}, {storage(out), data<void>(out), n});
  return out;
}

template <class C>
Tensor linear(const Tensor& x, const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& bias, int64_t group_size) {
  const int64_t n = check_linear<C>(x, codes, scale, bias, group_size);
  const auto w = as_coded<C>(codes, scale, n, group_size);
  return linear_by_panels(x, codes.size(0), n, bias,
                          [&](const CodedTile& tile, const Matrix& dense) { dequantize_tile(w, tile, dense); });
}

template <class C>
Tensor linear_backward(const Tensor& grad_out, const Tensor& codes, const Tensor& scale, std::optional<int64_t> given,
                       int64_t group_size) {
  const int64_t n = check_linear_backward<C>(grad_out, codes, scale, given, group_size);
  const auto w = as_coded<C>(codes, scale, n, group_size);
  return linear_backward_by_panels(grad_out, codes.size(0), n, group_size,
                                   [&](const CodedTile& tile, const Matrix& dense) { dequantize_tile(w, tile, dense); });
}

}  // namespace lowrank
