// torch.ops.lowrank on CUDA, the byte-shaped ops: check, unpack, launch on the current stream.
#include <map>

#include "check.h"
#include "cuda/launch.h"

namespace lowrank {
namespace {

using torch::stable::accelerator::DeviceGuard;

cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// A number of any type: on the CPU it is read now, on the device by the kernel.
Number number(const char* op, const char* name, const Tensor& t) {
  const std::pair<int32_t, Number::Type> types[] = {{aoti_torch_dtype_float32(), Number::Type::f32},
                                                    {aoti_torch_dtype_float64(), Number::Type::f64},
                                                    {aoti_torch_dtype_int32(), Number::Type::i32},
                                                    {aoti_torch_dtype_int64(), Number::Type::i64}};
  for (const auto& [dtype, type] : types) {
    if (dtype != dtype_of(t)) continue;
    if (!t.is_cpu()) return {type, t.data_ptr(), 0};
    return {Number::Type::host, nullptr, read_number(op, name, t)};
  }
  fail(op, name, " must be float32, float64, int32 or int64, got ", dtype_name(dtype_of(t)));
}

const float* pointer(const std::optional<Tensor>& t) { return t ? static_cast<const float*>(t->data_ptr()) : nullptr; }

void adamw_step(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                const Tensors& steps, const Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
                const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                const std::optional<Tensor>& skipped) {
  check_adamw_step(params, grads, exp_avgs, exp_avg_sqs, steps, lr, {grad_scale, found_inf, skipped});
  if (params.empty()) return;
  const AdamWScalars scalars{beta1, beta2, eps, weight_decay, number("adamw_step", "lr", lr), pointer(grad_scale),
                             pointer(found_inf), skipped ? static_cast<int64_t*>(skipped->data_ptr()) : nullptr};
  const DeviceGuard guard(params[0].get_device_index());
  const cudaStream_t stream = current_stream(params[0]);

  std::map<std::pair<DType, DType>, AdamWList> lists;
  const auto flush = [&](DType w, DType g, AdamWList& list) {
    STD_CUDA_CHECK(launch_advance(list, scalars.found_inf, stream));
    STD_CUDA_CHECK(launch_adamw(w, g, list, scalars, stream));
    list.count = 0;
  };
  for (size_t i = 0; i < params.size(); ++i) {
    const DType w = storage(params[i]), g = storage(grads[i]);
    AdamWList& list = lists[{w, g}];
    list.items[list.count++] = {params[i].data_ptr(),
                                grads[i].data_ptr(),
                                static_cast<float*>(exp_avgs[i].data_ptr()),
                                static_cast<float*>(exp_avg_sqs[i].data_ptr()),
                                static_cast<float*>(steps[i].data_ptr()),
                                params[i].numel()};
    if (list.count == AdamWList::kMost) flush(w, g, list);
  }
  for (auto& [dtypes, list] : lists)
    if (list.count > 0) flush(dtypes.first, dtypes.second, list);
}

Tensor channel_norms(const Tensor& grad, bool left) {
  expect_matrix("channel_norms", "grad", grad);
  const int64_t m = grad.size(0), n = grad.size(1);
  const DeviceGuard guard(grad.get_device_index());
  const Tensor norms = empty({left ? n : m}, place_of(grad));
  const auto launch = left ? launch_column_norms : launch_row_norms;
  STD_CUDA_CHECK(launch(storage(grad), grad.data_ptr(), static_cast<float*>(norms.data_ptr()), m, n, current_stream(grad)));
  return norms;
}

STABLE_TORCH_LIBRARY_IMPL(lowrank, CUDA, library) {
  library.impl("adamw_step", TORCH_BOX(&adamw_step));
  library.impl("channel_norms", TORCH_BOX(&channel_norms));
}

}  // namespace
}  // namespace lowrank
