#include "blockwise.h"

#include "philox.h"
#include "prefetch.h"
#include "wide_thread.h"

namespace lowrank {
inline namespace LR_ISA {
namespace {

constexpr Codebook<true> kSigned = make_codebook<true>();
constexpr Codebook<false> kUnsigned = make_codebook<false>();
constexpr Codebooks kBooks{kSigned, kUnsigned};

template <class F>
void with_codebook(bool is_signed, const F& f) {
  is_signed ? f(kSigned) : f(kUnsigned);
}

void run_quantize(const Blockwise& a, int64_t begin, int64_t end) {
  const WideThread block{};
  with_codebook(a.is_signed, [&](const auto& book) {
    dispatch(a.dtype, [&](auto type) {
      const auto* x = static_cast<const typename decltype(type)::type*>(a.values);
      for (int64_t i = begin; i < end; ++i) {
        const BlockAt at = block_at(a.blocks, i);
        prefetch(x + at.first, kBlock);
        quantize_block<1>(block, book, x + at.first, a.codes + at.first, a.absmax + i, at.n);
      }
    });
  });
}

void run_dequantize(const Blockwise& a, int64_t begin, int64_t end) {
  const WideThread block{};
  with_codebook(a.is_signed, [&](const auto& book) {
    for (int64_t i = begin; i < end; ++i) {
      const BlockAt at = block_at(a.blocks, i);
      dequantize_block<1>(block, book, a.codes + at.first, a.absmax[i], static_cast<float*>(a.values) + at.first, at.n);
    }
  });
}

int64_t run_adam(const Adam8bit& a, int64_t begin, int64_t end) {
  const WideThread block{};
  return dispatch(a.w_dtype, [&](auto w_type) {
    return dispatch(a.g_dtype, [&](auto g_type) {
      using W = typename decltype(w_type)::type;
      const auto* g = static_cast<const typename decltype(g_type)::type*>(a.g);
      auto* w = static_cast<W*>(a.w);
      return with_rounding<W>(a.rounding, kBlock, [&](const auto& rounding) {
        int64_t skipped = 0;
        for (int64_t i = begin; i < end; ++i) {
          const BlockAt at = block_at({1, a.numel}, i);
          const Moments8bit moments = at_block(a.moments, i, at.first);
          prefetch(g + at.first, kBlock);
          prefetch(w + at.first, kBlock);
          prefetch(moments.m, kBlock);
          prefetch(moments.v, kBlock);
          const IntoWeights target{w + at.first, rounding.run(at.first, at.n)};
          skipped += adam_8bit_block<1>(block, kBooks, g + at.first, target, moments, at.n, a.grad_scale, a.step, EveryChannel{});
        }
        return skipped;
      });
    });
  });
}

void run_mark_channels(const LowRankAdam8bit& a, uint8_t* ok, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) mark_channels<1>(WideThread{}, a.r, ok, block_at(a.blocks, i), a.left, a.grad_scale);
}

void run_low_rank_adam(const LowRankAdam8bit& a, int64_t begin, int64_t end) {
  const WideThread block{};
  dispatch(a.x_dtype, [&](auto type) {
    using X = typename decltype(type)::type;
    for (int64_t i = begin; i < end; ++i) {
      const BlockAt at = block_at(a.blocks, i);
      const auto run = [&](const auto& channels) {
        adam_8bit_block<1>(block, kBooks, a.r + at.first, IntoUpdate<X>{static_cast<X*>(a.x) + at.first},
                           at_block(a.moments, i, at.first), at.n, a.grad_scale, a.step, channels);
      };
      a.ok == nullptr ? run(EveryChannel{}) : run(channel_flags(a.ok, at, a.left));
    }
  });
}

}  // namespace

extern const BlockwiseKernels blockwise_table;
const BlockwiseKernels blockwise_table = {run_quantize, run_dequantize, run_adam, run_mark_channels, run_low_rank_adam};

}  // namespace LR_ISA
}  // namespace lowrank
