// torch.ops.lowrank on CUDA: INT8 weights.
#include "../int8.h"

#include "../../cuda/int8.h"
#include "coded.h"

namespace lowrank {
namespace {

Tensor dequantize_int8(const Tensor& codes, const Tensor& scale, int64_t group_size, std::optional<ScalarType> dtype) {
  return dequantize<Int8Coding>(codes, scale, {}, group_size, dtype);
}

void update(const Tensor& codes, const Tensor& scale, const Tensor& dense, const Int8Scalars& scalars, int64_t group_size) {
  const DeviceGuard guard(codes.get_device_index());
  STD_CUDA_CHECK(launch_update_int8(storage(dense), as_int8(codes, scale, group_size), dense.data_ptr(), scalars, codes.size(0),
                                    current_stream(codes)));
}

Number known(double value) { return {Number::Type::host, nullptr, value}; }

void int8_update_plain(const Tensor& codes, const Tensor& scale, const Tensor& dense, double alpha, double decay, int64_t seed,
                       int64_t step, int64_t parameter, int64_t offset, int64_t group_size) {
  check_int8_update(codes, scale, dense, group_size);
  check_int8_numbers("int8_update_", alpha, decay, step);
  expect_stream("int8_update_", parameter, offset);
  update(codes, scale, dense,
         {known(alpha), known(decay), known(double(step)), uint64_t(seed), uint64_t(offset), uint32_t(parameter)}, group_size);
}

void int8_update_tensor(const Tensor& codes, const Tensor& scale, const Tensor& dense, const Tensor& alpha, const Tensor& decay,
                        int64_t seed, const Tensor& step, int64_t parameter, int64_t offset, int64_t group_size) {
  constexpr const char* op = "int8_update_";
  check_int8_update(codes, scale, dense, group_size);
  const auto at = [&](const char* name, const Tensor& t) {
    expect_number(op, name, t, place_of(codes));
    return number(t);
  };
  const Number a = at("alpha", alpha), d = at("decay", decay), s = at("step", step);
  expect_stream("int8_update_", parameter, offset);
  update(codes, scale, dense, {a, d, s, uint64_t(seed), uint64_t(offset), uint32_t(parameter)}, group_size);
}

STABLE_TORCH_LIBRARY_IMPL(lowrank, CUDA, library) {
  library.impl("quantize_int8", TORCH_BOX(&quantize<Int8Coding>));
  library.impl("dequantize_int8", TORCH_BOX(&dequantize_int8));
  library.impl("int8_update_.tensor", TORCH_BOX(&int8_update_tensor));
  library.impl("int8_update_", TORCH_BOX(&int8_update_plain));
}

}  // namespace
}  // namespace lowrank
