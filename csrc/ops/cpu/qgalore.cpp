// torch.ops.lowrank on the CPU: low-rank steps on INT8 weights.
#include "qgalore.h"

#include "blockwise.h"

namespace lowrank {
namespace {

Int4 int4_of(const AnyBasis& basis, int64_t d) { return as_int4(basis.basis, *basis.scale, *basis.offset, d, basis.group_size); }

// Calls f(row, column, rows, columns) on tiles that end with a group of their rows.
template <class F>
void for_int8_tiles(int64_t m, int64_t n, const F& f) {
  const int64_t high = std::min(m, kTileSide), wide = std::max<int64_t>(1, kTileElements / std::max<int64_t>(1, high));
  const int64_t whole = wide / kLargestGroup * kLargestGroup;
  for (int64_t j = 0; j < n; j += whole)
    for (int64_t i = 0; i < m; i += high) f(i, j, std::min(high, m - i), std::min(whole, n - j));
}

}  // namespace

void back_project_int8_into(const Int8Matrix& w, int64_t m, const Tensor& x, const AnyBasis& basis, bool left, const Int8Step& step,
                            Int8Workspace& work) {
  const int64_t n = w.columns, r = basis.rank();
  if (m == 0 || n == 0) return;
  const auto each_tile = [&](const auto& product) {
    for_int8_tiles(m, n, [&](int64_t i, int64_t j, int64_t rows, int64_t columns) {
      const Tensor update = work.work.tile.matrix(rows, columns);
      product(update, i, j, rows, columns);
      update_int8_tile(w, {i, j, rows, columns}, {DType::f32, data<float>(update), columns}, step);
    });
  };
  if (basis.is_int4()) {
    const Int4 b = int4_of(basis, left ? m : n);
    each_tile([&](const Tensor& update, int64_t i, int64_t j, int64_t, int64_t) {
      back_project_int4_tile(update, i, j, x, b, left, 0.0, 1.0, work.panel);
    });
  } else {
    const Tensor b = as_fp32(basis.basis, work.work.basis);
    each_tile([&](const Tensor& update, int64_t i, int64_t j, int64_t rows, int64_t columns) {
      if (left) {
        multiply(update, part(b, i, 0, rows, r), part(x, 0, j, r, columns));
      } else {
        multiply(update, part(x, i, 0, rows, r), transposed(b, j, columns));
      }
    });
  }
}

namespace {

constexpr const char* kBack = "back_project_int8_";

void back_project(const Tensor& codes, const Tensor& scale, const Tensor& x, const AnyBasis& basis, double alpha, double decay,
                  bool left, int64_t seed, uint32_t step, int64_t parameter, int64_t offset, int64_t group_size) {
  const Int8Step at{{float(alpha), float(decay)}, {uint64_t(seed), step, uint32_t(parameter)}, uint64_t(offset)};
  Int8Workspace work;
  back_project_int8_into(as_int8(codes, scale, group_size), codes.size(0), x, basis, left, at, work);
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
  const double a = number_of(kBack, "alpha", alpha, codes), d = number_of(kBack, "decay", decay, codes);
  const uint32_t at = counter_step(number_of(kBack, "step", step, codes));
  expect_stream(kBack, parameter, offset);
  back_project(codes, scale, low_rank, b, a, d, left, seed, at, parameter, offset, group_size);
}

// A step's hyper-parameters for one matrix, and the count of the step for the random bits.
struct At {
  AdamStep adam;
  double step;
  float grad_scale;
};

// One step. Returns how many weights were left out.
int64_t qgalore(const Int8Weight& weight, const Tensor& gradient, const AnyBasis& basis, const Stored& moments, const At& at,
                bool projected, bool left, Int8Workspace& work) {
  const int64_t m = weight.codes.size(0), n = weight.codes.size(1);
  const Tensor x = work.work.low_rank.matrix(moments.exp_avg.size(0), moments.exp_avg.size(1));
  if (!projected) {
    if (basis.is_int4()) {
      project_int4_into(x, gradient, int4_of(basis, left ? m : n), left, work.panel, work.work.tile);
    } else {
      project_into(x, gradient, as_fp32(basis.basis, work.work.basis), left, work.work.tile);
    }
  }
  std::vector<uint8_t> ok;
  const int64_t skipped = adam_8bit_low_rank(projected ? gradient : x, moments, x, ok, at.adam, at.grad_scale, left);
  const Int8Step how{{at.adam.alpha, at.adam.decay},
                     {uint64_t(weight.seed), counter_step(at.step), uint32_t(weight.parameter)},
                     uint64_t(weight.offset)};
  if (skipped < int64_t(ok.size()))
    back_project_int8_into(as_int8(weight.codes, weight.scale, weight.group_size), m, x, basis, left, how, work);
  return skipped * (left ? m : n);
}

template <bool PROJECTED>
constexpr const char* kName = PROJECTED ? "qgalore_subspace_step" : "qgalore_step";

template <bool PROJECTED>
void step_plain(const Tensor& codes, const Tensor& weight_scale, const Tensor& gradient, const Tensor& basis,
                const std::optional<Tensor>& basis_scale, const std::optional<Tensor>& basis_offset, const Tensor& exp_avg,
                const Tensor& exp_avg_sq, const Tensor& exp_avg_absmax, const Tensor& exp_avg_sq_absmax, int64_t step, double lr,
                double beta1, double beta2, double eps, double weight_decay, double scale, bool left, int64_t seed,
                int64_t parameter, int64_t offset, int64_t group_size, int64_t basis_group_size) {
  const Int8Weight weight{codes, weight_scale, group_size, seed, parameter, offset};
  const AnyBasis b{basis, basis_scale, basis_offset, basis_group_size};
  const Stored moments{exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax};
  check_qgalore(kName<PROJECTED>, weight, gradient, b, moments, PROJECTED, left);
  const double count = count_of(kName<PROJECTED>, step);
  const Hyper hyper{beta1, beta2, eps, weight_decay, scale};
  Int8Workspace work;
  qgalore(weight, gradient, b, moments, {hyper.at(count, lr), count, 1.0f}, PROJECTED, left, work);
}

template <bool PROJECTED>
void step_tensor(const Tensor& codes, const Tensor& weight_scale, const Tensor& gradient, const Tensor& basis,
                 const std::optional<Tensor>& basis_scale, const std::optional<Tensor>& basis_offset, const Tensor& exp_avg,
                 const Tensor& exp_avg_sq, const Tensor& exp_avg_absmax, const Tensor& exp_avg_sq_absmax, const Tensor& step,
                 const Tensor& lr, double beta1, double beta2, double eps, double weight_decay, double scale, bool left,
                 int64_t seed, int64_t parameter, int64_t offset, int64_t group_size, int64_t basis_group_size) {
  const Int8Weight weight{codes, weight_scale, group_size, seed, parameter, offset};
  const AnyBasis b{basis, basis_scale, basis_offset, basis_group_size};
  const Stored moments{exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax};
  check_qgalore(kName<PROJECTED>, weight, gradient, b, moments, PROJECTED, left);
  const double count = number_of(kName<PROJECTED>, "step", step, codes), rate = number_of(kName<PROJECTED>, "lr", lr, codes);
  const Hyper hyper{beta1, beta2, eps, weight_decay, scale};
  Int8Workspace work;
  qgalore(weight, gradient, b, moments, {hyper.at(count, rate), count, 1.0f}, PROJECTED, left, work);
}

template <bool PROJECTED>
void step_list(const Tensors& codes, const Tensors& weight_scales, const Tensors& gradients, const Tensors& bases,
               const Tensors& basis_scales, const Tensors& basis_offsets, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
               const Tensors& exp_avg_absmaxes, const Tensors& exp_avg_sq_absmaxes, const Tensors& steps, const Tensor& lr,
               double beta1, double beta2, double eps, double weight_decay, double scale, bool left, int64_t seed,
               const std::vector<int64_t>& parameters, const std::vector<int64_t>& offsets, int64_t group_size,
               int64_t basis_group_size, const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
               const std::optional<Tensor>& skipped) {
  constexpr const char* op = kName<PROJECTED>;
  const Guards guards{grad_scale, found_inf, skipped};
  const Int8Weights weights{codes, weight_scales, group_size, seed, parameters, offsets};
  const StoredLists moments{exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes};
  const bool int4 = !basis_scales.empty() || !basis_offsets.empty();
  check_length(op, "weight_scales", weight_scales, "codes", codes);
  check_length(op, PROJECTED ? "low_rank_grads" : "grads", gradients, "codes", codes);
  check_length(op, "bases", bases, "codes", codes);
  if (int4) {
    check_length(op, "basis_scales", basis_scales, "codes", codes);
    check_length(op, "basis_offsets", basis_offsets, "codes", codes);
  }
  moments.check_lengths(op, "codes", codes);
  check_length(op, "steps", steps, "codes", codes);
  weights.check_lengths_of_numbers(op);
  check_guards(op, "codes", codes, steps, &lr, guards);
  const auto basis_at = [&](size_t i) -> AnyBasis {
    if (int4) return {bases[i], basis_scales[i], basis_offsets[i], basis_group_size};
    return {bases[i], std::nullopt, std::nullopt, basis_group_size};
  };
  for (size_t i = 0; i < codes.size(); ++i)
    check_qgalore(op, weights.at(i), gradients[i], basis_at(i), moments.at(i), PROJECTED, left);
  const double rate = read_number(op, "lr", lr);
  if (is_no_op(guards)) return;
  const Hyper hyper{beta1, beta2, eps, weight_decay, scale};
  Int8Workspace work;
  for (size_t i = 0; i < codes.size(); ++i) {
    const float step = *data<float>(steps[i]) += 1.0f;
    count_skipped(guards, qgalore(weights.at(i), gradients[i], basis_at(i), moments.at(i),
                                  {hyper.at(step, rate), double(step), grad_scale_of(guards)}, PROJECTED, left, work));
  }
}

STABLE_TORCH_LIBRARY_IMPL(lowrank, CPU, library) {
  library.impl("back_project_int8_.tensor", TORCH_BOX(&back_project_tensor));
  library.impl("back_project_int8_", TORCH_BOX(&back_project_plain));
  library.impl("qgalore_step.tensor", TORCH_BOX(&step_tensor<false>));
  library.impl("qgalore_step", TORCH_BOX(&step_plain<false>));
  library.impl("qgalore_step.list", TORCH_BOX(&step_list<false>));
  library.impl("qgalore_subspace_step.tensor", TORCH_BOX(&step_tensor<true>));
  library.impl("qgalore_subspace_step", TORCH_BOX(&step_plain<true>));
  library.impl("qgalore_subspace_step.list", TORCH_BOX(&step_list<true>));
}

}  // namespace
}  // namespace lowrank
