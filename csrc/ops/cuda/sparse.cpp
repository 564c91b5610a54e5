// torch.ops.lowrank on CUDA: selecting, gathering and scattering rows, and steps on them.
#include "../../cuda/sparse.h"

#include "../step.h"
#include "tensors.h"

namespace lowrank {
namespace {

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// Device memory for `count` numbers of 8 bytes.
Tensor words(int64_t count, const Tensor& like) { return empty({count}, place_of(like), aoti_torch_dtype_int64()); }

SelectedRows selected(const Tensor& matrix, const Tensor& indices, const std::optional<Tensor>& scale, bool left,
                      const uint32_t* owner = nullptr) {
  return {data<int32_t>(indices), pointer(scale), owner, indices.size(0), matrix.size(left ? 0 : 1)};
}

std::tuple<Tensor, Tensor> select_rows(const Tensor& norms, int64_t r, std::string method, int64_t seed, int64_t step,
                                       int64_t parameter) {
  const Method how = check_select_rows(norms, r, method);
  const DeviceGuard guard(norms.get_device_index());
  const int64_t d = norms.size(0);
  const Tensor indices = empty({r}, place_of(norms), aoti_torch_dtype_int32()), scale = empty({r}, place_of(norms));
  const bool draws = how == Method::sample_replace;
  const Tensor keys = words(d, norms), shares = words(draws ? d : 0, norms);
  const Tensor counts = words(draws ? (d + r + 1) / 2 : 0, norms);
  const RowSelection selection{how,
                               data<float>(norms),
                               d,
                               r,
                               data<uint64_t>(keys),
                               data<uint64_t>(shares),
                               data<int32_t>(counts),
                               draws ? data<int32_t>(counts) + d : nullptr,
                               data<int32_t>(indices),
                               data<float>(scale)};
  const RandomStream stream{uint64_t(seed), uint32_t(step), uint32_t(parameter)};
  STD_CUDA_CHECK(launch_select_rows(selection, stream, current_stream(norms)));
  return {indices, scale};
}

Tensor gather_rows(const Tensor& grad, const Tensor& indices, const std::optional<Tensor>& scale, bool left) {
  check_gather_rows(grad, indices, scale);
  const DeviceGuard guard(grad.get_device_index());
  const Tensor out = empty(selected_shape(grad, indices, left), place_of(grad));
  STD_CUDA_CHECK(launch_gather(storage(grad), grad.data_ptr(), selected(grad, indices, scale, left), data<float>(out), grad.size(0),
                               grad.size(1), left, current_stream(grad)));
  return out;
}

void scatter_add_rows(const Tensor& param, const Tensor& low_rank, const Tensor& indices, const std::optional<Tensor>& scale,
                      double alpha, bool left) {
  check_scatter_add_rows(param, low_rank, indices, scale, left);
  const DeviceGuard guard(param.get_device_index());
  const cudaStream_t stream = current_stream(param);
  const Tensor memory = words((param.size(left ? 0 : 1) + 1) / 2, param);
  auto* owner = data<uint32_t>(memory);
  const SelectedRows rows = selected(param, indices, scale, left, owner);
  STD_CUDA_CHECK(launch_claim(rows, owner, stream));
  STD_CUDA_CHECK(launch_scatter_add(storage(param), param.data_ptr(), rows, data<float>(low_rank), param.size(0), param.size(1),
                                    float(alpha), left, stream));
}

struct Hyper {
  double beta1, beta2, eps, weight_decay, scale;
};

// Memory of a step: who owns each row or column, then a flag a column.
int64_t step_words(const Tensor& param, bool left) {
  return (param.size(left ? 0 : 1) + 1) / 2 + (left ? (param.size(1) + 7) / 8 : 0);
}

void run(const Tensor& param, const Tensor& grad, const Tensor& indices, const std::optional<Tensor>& row_scale,
         const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& memory, const Rounding& rounding, const Hyper& hyper,
         const Number& step, const Number& lr, const Guards& guards, bool left, cudaStream_t stream) {
  auto* owner = data<uint32_t>(memory);
  const SelectedRows rows = selected(param, indices, row_scale, left, owner);
  const bool flags = left && hyper.weight_decay != 0;
  const GrassArguments arguments{param.data_ptr(),
                                 grad.data_ptr(),
                                 data<float>(exp_avg),
                                 data<float>(exp_avg_sq),
                                 param.size(0),
                                 param.size(1),
                                 rows,
                                 hyper.beta1,
                                 hyper.beta2,
                                 hyper.eps,
                                 hyper.weight_decay,
                                 hyper.scale,
                                 step,
                                 lr,
                                 pointer(guards.grad_scale),
                                 pointer(guards.found_inf),
                                 guards.skipped ? data<int64_t>(*guards.skipped) : nullptr,
                                 flags ? reinterpret_cast<uint8_t*>(owner + (rows.size + 1) / 2 * 2) : nullptr,
                                 rounding};
  STD_CUDA_CHECK(launch_claim(rows, owner, stream));
  STD_CUDA_CHECK(launch_grass(storage(param), storage(grad), arguments, left, stream));
}

// Adds 1 to the counters unless found_inf.
void advance_all(const Tensors& steps, const std::optional<Tensor>& found_inf, cudaStream_t stream) {
  StepList counters;
  for (size_t i = 0; i < steps.size(); ++i) {
    counters.steps[counters.count++] = data<float>(steps[i]);
    if (counters.count < AdamWList::kMost && i + 1 < steps.size()) continue;
    STD_CUDA_CHECK(launch_advance(counters, pointer(found_inf), stream));
    counters.count = 0;
  }
}

// How weight i is rounded; the kernel reads the step.
Rounding rounding_of(const Draws& draws, size_t i) {
  if (!draws.stochastic) return {};
  return {true, {uint64_t(draws.seed), 0, uint32_t(draws.parameter(i))}, uint64_t(draws.offset(i))};
}

void step_rows(const Tensors& weights, const Tensors& gradients, const Tensors& indices, const Tensors& row_scales,
               const Tensors& exp_avgs, const Tensors& exp_avg_sqs, const Tensors& steps, const Tensor& lr, double beta1,
               double beta2, double eps, double weight_decay, double scale, bool left, bool advance, bool stochastic, int64_t seed,
               const std::vector<int64_t>& parameters, const std::vector<int64_t>& offsets, const std::optional<Tensor>& grad_scale,
               const std::optional<Tensor>& found_inf, const std::optional<Tensor>& skipped, const std::string& op) {
  const Guards guards{grad_scale, found_inf, skipped};
  const RowLists lists{weights, gradients, indices, row_scales, exp_avgs, exp_avg_sqs, steps};
  const Draws draws{stochastic, seed, parameters, offsets};
  check_rows(op, lists, lr, left, advance, draws, guards);
  if (weights.empty()) return;
  const DeviceGuard guard(weights[0].get_device_index());
  const cudaStream_t stream = current_stream(weights[0]);
  if (advance) advance_all(steps, found_inf, stream);
  int64_t most = 0;
  for (const Tensor& weight : weights) most = std::max(most, step_words(weight, left));
  const Tensor memory = words(most, weights[0]);
  const Hyper hyper{beta1, beta2, eps, weight_decay, scale};
  const Number rate = number(lr);
  for (size_t i = 0; i < weights.size(); ++i)
    run(weights[i], gradients[i], indices[i], lists.scale_at(i), exp_avgs[i], exp_avg_sqs[i], memory, rounding_of(draws, i), hyper,
        number(steps[i]), rate, guards, left, stream);
}

STABLE_TORCH_LIBRARY_IMPL(lowrank, CUDA, library) {
  library.impl("select_rows", TORCH_BOX(&select_rows));
  library.impl("gather_rows", TORCH_BOX(&gather_rows));
  library.impl("scatter_add_rows_", TORCH_BOX(&scatter_add_rows));
  library.impl("step.rows", TORCH_BOX(&step_rows));
}

}  // namespace
}  // namespace lowrank
