// torch.ops.lowrank on the CPU: blockwise 8-bit codes, and Adam whose moments are stored so.
#include "../blockwise.h"

#include "../../cpu/blockwise.h"
#include "rule.h"

namespace lowrank {
namespace {

std::tuple<Tensor, Tensor> quantize_blockwise(const Tensor& x, bool is_signed, bool by_row) {
  check_quantize_blockwise(x, by_row);
  const auto sizes = x.sizes();
  const RowBlocks blocks = blocks_of(sizes, by_row);
  const Tensor codes = empty(Shape(sizes.begin(), sizes.end()), aoti_torch_dtype_uint8());
  const Tensor absmax = empty(absmax_shape(sizes, by_row));
  const Blockwise work{storage(x), data<void>(x), data<uint8_t>(codes), data<float>(absmax), blocks, is_signed};
  parallel(block_count(blocks), kBlock, [&](int64_t begin, int64_t end) { blockwise_kernels().quantize(work, begin, end); });
  return {codes, absmax};
}

Tensor dequantize_blockwise(const Tensor& codes, const Tensor& absmax, bool is_signed) {
  check_dequantize_blockwise(codes, absmax);
  const auto sizes = codes.sizes();
  const RowBlocks blocks = blocks_of(sizes, is_by_row(codes, absmax));
  const Tensor x = empty(Shape(sizes.begin(), sizes.end()));
  const Blockwise work{DType::f32, data<void>(x), data<uint8_t>(codes), data<float>(absmax), blocks, is_signed};
  parallel(block_count(blocks), kBlock, [&](int64_t begin, int64_t end) { blockwise_kernels().dequantize(work, begin, end); });
  return x;
}

void adam_8bit(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
               const Tensors& exp_avg_absmaxes, const Tensors& exp_avg_sq_absmaxes, const Tensors& steps, const Tensor& lr,
               double beta1, double beta2, double eps, double weight_decay, bool stochastic, int64_t seed,
               const std::vector<int64_t>& parameters, const std::vector<int64_t>& offsets, const std::optional<Tensor>& grad_scale,
               const std::optional<Tensor>& found_inf, const std::optional<Tensor>& skipped) {
  const Guards guards{grad_scale, found_inf, skipped};
  const StoredLists moments{exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes};
  const Draws draws{stochastic, seed, parameters, offsets};
  check_adam_8bit(params, grads, moments, steps, lr, draws, guards);
  const double rate = read_number(lr);
  if (is_no_op(guards)) return;
  const Hyper hyper{beta1, beta2, eps, weight_decay, 1.0};
  for (size_t i = 0; i < params.size(); ++i) {
    const double step = count_of(steps[i], true);
    const Adam8bit adam{storage(params[i]),    storage(grads[i]),        data<void>(params[i]),
                        data<void>(grads[i]),  moments.at(i).pointers(), params[i].numel(),
                        grad_scale_of(guards), hyper.at(step, rate),     rounding_of(draws, i, step)};
    std::atomic<int64_t> left_out = 0;
    parallel(block_count({1, adam.numel}), kBlock,
             [&](int64_t begin, int64_t end) { left_out += blockwise_kernels().adam(adam, begin, end); });
    count_skipped(guards, left_out);
  }
}

void adam_8bit_low_rank_list(const Tensors& low_rank_grads, const Tensors& updates, const Tensors& exp_avgs,
                             const Tensors& exp_avg_sqs, const Tensors& exp_avg_absmaxes, const Tensors& exp_avg_sq_absmaxes,
                             const Tensors& steps, double beta1, double beta2, double eps, bool left,
                             const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
  const StoredLists moments{exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes};
  check_adam_8bit_low_rank(low_rank_grads, updates, moments, steps, grad_scale, found_inf);
  const Guards guards{grad_scale, found_inf, std::nullopt};
  if (low_rank_grads.empty() || is_no_op(guards)) return;  // of no matrix the guards are not checked
  const Hyper hyper{beta1, beta2, eps, 0.0, 1.0};
  for (size_t i = 0; i < low_rank_grads.size(); ++i) {
    const AdamStep at = hyper.at(*data<float>(steps[i]), 0.0);
    adam(low_rank_grads[i], {exp_avgs[i], exp_avg_sqs[i], &exp_avg_absmaxes[i], &exp_avg_sq_absmaxes[i]}, updates[i], at,
         grad_scale_of(guards), left);
  }
}

STABLE_TORCH_LIBRARY_IMPL(lowrank, CPU, library) {
  library.impl("quantize_blockwise", TORCH_BOX(&quantize_blockwise));
  library.impl("dequantize_blockwise", TORCH_BOX(&dequantize_blockwise));
  library.impl("adam_8bit_", TORCH_BOX(&adam_8bit));
  library.impl("adam_8bit_low_rank_", TORCH_BOX(&adam_8bit_low_rank_list));
}

}  // namespace
}  // namespace lowrank
