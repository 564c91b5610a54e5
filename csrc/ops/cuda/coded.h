// The ops on weights in codes, for each coding C. The linear layers are Triton's.
#pragma once

#include "../../cuda/coded.h"
#include "../coded.h"
#include "tensors.h"

namespace lowrank {

using torch::headeronly::ScalarType;

template <class C>
std::tuple<Tensor, Tensor> quantize(const Tensor& weight, int64_t group_size) {
  check_quantize<C>(weight, group_size);
  const int64_t m = weight.size(0), n = weight.size(1);
  const DeviceGuard guard(weight.get_device_index());
  const Place place = place_of(weight);
  const Tensor codes = empty(codes_shape<C>(m, n), place, C::dtype()), scale = empty(scale_shape(m, n, group_size), place);
  STD_CUDA_CHECK(
      launch_quantize(storage(weight), weight.data_ptr(), as_coded<C>(codes, scale, n, group_size), m, current_stream(weight)));
  return {codes, scale};
}

template <class C>
Tensor dequantize(const Tensor& codes, const Tensor& scale, std::optional<int64_t> given, int64_t group_size,
                  std::optional<ScalarType> dtype) {
  const int32_t type = dtype ? int32_t(*dtype) : aoti_torch_dtype_float32();
  const int64_t n = check_dequantize<C>(codes, scale, given, group_size, type), m = codes.size(0);
  const DeviceGuard guard(codes.get_device_index());
  const Tensor out = empty({m, n}, place_of(codes), type);
  STD_CUDA_CHECK(
      launch_dequantize(storage(out), as_coded<C>(codes, scale, n, group_size), out.data_ptr(), m, current_stream(codes)));
  return out;
}

}  // namespace lowrank
