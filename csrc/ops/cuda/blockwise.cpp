// torch.ops.lowrank on CUDA: blockwise 8-bit codes, and Adam on them. The products of galore_step_8bit are Triton's.
#include "../../cuda/blockwise.h"

#include <utility>

#include "../blockwise.h"
#include "tensors.h"

namespace lowrank {
namespace {

std::tuple<Tensor, Tensor> quantize_blockwise(const Tensor& x, bool is_signed, bool by_row) {
  check_quantize_blockwise(x, by_row);
  const DeviceGuard guard(x.get_device_index());
  const auto sizes = x.sizes();
  const Tensor codes = empty(Shape(sizes.begin(), sizes.end()), place_of(x), aoti_torch_dtype_uint8());
  const Tensor absmax = empty(absmax_shape(sizes, by_row), place_of(x));
  STD_CUDA_CHECK(launch_quantize_blockwise(storage(x), x.data_ptr(), static_cast<uint8_t*>(codes.data_ptr()),
                                           static_cast<float*>(absmax.data_ptr()), blocks_of(sizes, by_row), is_signed,
                                           current_stream(x)));
  return {codes, absmax};
}

Tensor dequantize_blockwise(const Tensor& codes, const Tensor& absmax, bool is_signed) {
  check_dequantize_blockwise(codes, absmax);
  const DeviceGuard guard(codes.get_device_index());
  const auto sizes = codes.sizes();
  const Tensor x = empty(Shape(sizes.begin(), sizes.end()), place_of(codes));
  STD_CUDA_CHECK(launch_dequantize_blockwise(static_cast<const uint8_t*>(codes.data_ptr()),
                                             static_cast<const float*>(absmax.data_ptr()), static_cast<float*>(x.data_ptr()),
                                             blocks_of(sizes, is_by_row(codes, absmax)), is_signed, current_stream(codes)));
  return x;
}

void adam_8bit(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
               const Tensors& exp_avg_absmaxes, const Tensors& exp_avg_sq_absmaxes, const Tensors& steps, const Tensor& lr,
               double beta1, double beta2, double eps, double weight_decay, bool stochastic, int64_t seed,
               const std::vector<int64_t>& parameters, const std::vector<int64_t>& offsets, const std::optional<Tensor>& grad_scale,
               const std::optional<Tensor>& found_inf, const std::optional<Tensor>& skipped) {
  const StoredLists moments{exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes};
  const Guards guards{grad_scale, found_inf, skipped};
  const Draws draws{stochastic, seed, parameters, offsets};
  check_adam_8bit(params, grads, moments, steps, lr, draws, guards);
  if (params.empty()) return;
  const AdamWScalars scalars = adamw_scalars(beta1, beta2, eps, weight_decay, lr, guards);
  const DeviceGuard guard(params[0].get_device_index());
  const cudaStream_t stream = current_stream(params[0]);
  const auto dtypes_of = [&](size_t i) { return std::pair{storage(params[i]), storage(grads[i])}; };
  const auto item = [&](size_t i) {
    return Adam8bitList::Item{params[i].data_ptr(), grads[i].data_ptr(), moments.at(i).pointers(),
                              static_cast<float*>(steps[i].data_ptr()), params[i].numel()};
  };
  const auto launch = [&](const auto& dtypes, const auto& list, auto... seeds) {
    STD_CUDA_CHECK(launch_advance(StepList::of(list), scalars.found_inf, stream));
    STD_CUDA_CHECK(launch_adam_8bit(dtypes.first, dtypes.second, list, scalars, seeds..., stream));
  };
  launch_rounded<Adam8bitList, DrawnAdam8bitList>(params.size(), draws, dtypes_of, item, launch);
}

void adam_8bit_low_rank(const Tensors& low_rank_grads, const Tensors& updates, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                        const Tensors& exp_avg_absmaxes, const Tensors& exp_avg_sq_absmaxes, const Tensors& steps, double beta1,
                        double beta2, double eps, bool left, const std::optional<Tensor>& grad_scale,
                        const std::optional<Tensor>& found_inf) {
  const StoredLists moments{exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes};
  check_adam_8bit_low_rank(low_rank_grads, updates, moments, steps, grad_scale, found_inf);
  if (low_rank_grads.empty()) return;
  const LowRankAdam8bitScalars scalars{beta1, beta2, eps, pointer(grad_scale), pointer(found_inf), left};
  const DeviceGuard guard(low_rank_grads[0].get_device_index());
  const cudaStream_t stream = current_stream(low_rank_grads[0]);

  int64_t channels = 0;
  for (const Tensor& r : low_rank_grads) channels += r.size(left ? 1 : 0);
  const Tensor flags = empty({channels}, place_of(low_rank_grads[0]), aoti_torch_dtype_uint8());
  auto* ok = static_cast<uint8_t*>(flags.data_ptr());
  if (channels > 0) STD_CUDA_CHECK(cudaMemsetAsync(ok, 1, size_t(channels), stream));

  launch_lists<LowRankAdam8bitList>(
      low_rank_grads.size(), [&](size_t i) { return storage(updates[i]); },
      [&](size_t i) {
        const Tensor& r = low_rank_grads[i];
        uint8_t* const first = std::exchange(ok, ok + r.size(left ? 1 : 0));
        return LowRankAdam8bitList::Item{static_cast<const float*>(r.data_ptr()),
                                         updates[i].data_ptr(),
                                         moments.at(i).pointers(),
                                         static_cast<const float*>(steps[i].data_ptr()),
                                         first,
                                         blocks_of(r.sizes(), true)};
      },
      [&](DType x, const LowRankAdam8bitList& list) {
        STD_CUDA_CHECK(launch_mark_channels(list, scalars, stream));
        STD_CUDA_CHECK(launch_adam_8bit_low_rank(x, list, scalars, stream));
      });
}

STABLE_TORCH_LIBRARY_IMPL(lowrank, CUDA, library) {
  library.impl("quantize_blockwise", TORCH_BOX(&quantize_blockwise));
  library.impl("dequantize_blockwise", TORCH_BOX(&dequantize_blockwise));
  library.impl("adam_8bit_", TORCH_BOX(&adam_8bit));
  library.impl("adam_8bit_low_rank_", TORCH_BOX(&adam_8bit_low_rank));
}

}  // namespace
}  // namespace lowrank
