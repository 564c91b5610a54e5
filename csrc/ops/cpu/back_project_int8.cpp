// torch.ops.lowrank on the CPU: back-projection into INT8 weights.
#include "../back_project_int8.h"

#include "apply.h"

namespace lowrank {
namespace {

constexpr const char* kBack = "back_project_int8_";

void back_project(const Tensor& codes, const Tensor& scale, const Tensor& x, const AnyBasis& basis, double alpha, double decay,
                  bool left, int64_t seed, uint32_t step, int64_t parameter, int64_t offset, int64_t group_size) {
  Workspace work;
  const auto stored = [&]() -> Basis {
    if (!basis.is_int4()) return as_fp32(basis.basis, work.basis);
    return as_int4(basis.basis, *basis.scale, *basis.offset, codes.size(left ? 0 : 1), basis.group_size);
  };
  const Basis b = stored();
  apply_int8_into(as_int8(codes, scale, group_size), codes.size(0), {left, float(decay), float(alpha), &b, &x},
                  {uint64_t(seed), step, uint32_t(parameter)}, uint64_t(offset), work);
}

void back_project_plain(const Tensor& codes, const Tensor& scale, const Tensor& low_rank, const Tensor& basis,
                        const std::optional<Tensor>& basis_scale, const std::optional<Tensor>& basis_offset, double alpha,
                        double decay, bool left, int64_t seed, int64_t step, int64_t parameter, int64_t offset, int64_t group_size,
                        int64_t basis_group_size) {
  const AnyBasis b{basis, basis_scale, basis_offset, basis_group_size};
  check_back_project_int8(codes, scale, low_rank, b, left, group_size);
  check_int8_numbers(kBack, alpha, decay, step);
  expect_stream(kBack, parameter, offset);
  back_project(codes, scale, low_rank, b, alpha, decay, left, seed, uint32_t(step), parameter, offset, group_size);
}

void back_project_tensor(const Tensor& codes, const Tensor& scale, const Tensor& low_rank, const Tensor& basis,
                         const std::optional<Tensor>& basis_scale, const std::optional<Tensor>& basis_offset, const Tensor& alpha,
                         const Tensor& decay, bool left, int64_t seed, const Tensor& step, int64_t parameter, int64_t offset,
                         int64_t group_size, int64_t basis_group_size) {
  const AnyBasis b{basis, basis_scale, basis_offset, basis_group_size};
  check_back_project_int8(codes, scale, low_rank, b, left, group_size);
  expect_number(kBack, "alpha", alpha, place_of(codes));
  expect_number(kBack, "decay", decay, place_of(codes));
  expect_number(kBack, "step", step, place_of(codes));
  expect_stream(kBack, parameter, offset);
  back_project(codes, scale, low_rank, b, read_number(alpha), read_number(decay), left, seed, counter_step(read_number(step)),
               parameter, offset, group_size);
}

STABLE_TORCH_LIBRARY_IMPL(lowrank, CPU, library) {
  library.impl("back_project_int8_.tensor", TORCH_BOX(&back_project_tensor));
  library.impl("back_project_int8_", TORCH_BOX(&back_project_plain));
}

}  // namespace
}  // namespace lowrank
