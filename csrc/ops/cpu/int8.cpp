// torch.ops.lowrank on the CPU: INT8 weights.
#include "../int8.h"

#include "coded.h"

namespace lowrank {
namespace {

Tensor dequantize_int8(const Tensor& codes, const Tensor& scale, int64_t group_size, std::optional<ScalarType> dtype) {
  return dequantize<Int8Coding>(codes, scale, {}, group_size, dtype);
}

Tensor int8_linear_backward(const Tensor& grad_out, const Tensor& codes, const Tensor& scale, int64_t group_size) {
  return linear_backward<Int8Coding>(grad_out, codes, scale, {}, group_size);
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

STABLE_TORCH_LIBRARY_IMPL(lowrank, CPU, library) {
  library.impl("quantize_int8", TORCH_BOX(&quantize<Int8Coding>));
  library.impl("dequantize_int8", TORCH_BOX(&dequantize_int8));
  library.impl("int8_update_.tensor", TORCH_BOX(&int8_update_tensor));
  library.impl("int8_update_", TORCH_BOX(&int8_update_plain));
  library.impl("int8_linear", TORCH_BOX(&linear<Int8Coding>));
  library.impl("int8_linear_backward", TORCH_BOX(&int8_linear_backward));
}

}  // namespace
}  // namespace lowrank
