#include "rule.h"

#include "../../cpu/blockwise.h"
#include "../../cpu/norms.h"
#include "../../cpu/residual.h"
#include "../../cpu/steps.h"

namespace lowrank {
namespace {

// Calls f(begin, end) on parts of the channels of a matrix.
template <class F>
void for_channels(const Tensor& t, bool left, const F& f) {
  parallel(t.size(left ? 1 : 0), t.size(left ? 0 : 1), f);
}

// Calls f(begin, end) on parts of the blocks of R.
template <class F>
void for_blocks(const Tensor& r, const F& f) {
  parallel(block_count(blocks_of(r.sizes(), true)), kBlock, f);
}

LowRankAdam8bit adam_8bit_of(const Tensor& r, const Moments& moments, const Tensor& x, const AdamStep& step, float grad_scale,
                             bool left) {
  return {data<float>(r), storage(x), data<void>(x), moments.stored().pointers(), nullptr, blocks_of(r.sizes(), true),
          left,           grad_scale, step};
}

void advance_8bit(LowRankAdam8bit a, const Tensor& r, const Channels& c) {
  a.ok = c.flags();
  for_blocks(r, [&](int64_t begin, int64_t end) { blockwise_kernels().low_rank_adam(a, begin, end); });
}

// r <- factor * r; squares <- the sums of its squares by channel.
void square(const Tensor& r, std::vector<float>& squares, float factor, bool left) {
  const Squares a{data<float>(r), squares.data(), r.size(0), r.size(1), factor};
  for_channels(r, left, [&](int64_t begin, int64_t end) {
    (left ? residual_kernels().square_columns : residual_kernels().square_rows)(a, begin, end);
  });
}

std::vector<float> norms_of(const Tensor& grad, bool left) {
  const int64_t m = grad.size(0), n = grad.size(1);
  std::vector<float> norms(left ? n : m);
  const Matrix g{storage(grad), data<void>(grad), n};
  for_channels(grad, left, [&](int64_t begin, int64_t end) {
    left ? norm_kernels().columns(g, m, norms.data(), begin, end) : norm_kernels().rows(g, n, norms.data(), begin, end);
  });
  return norms;
}

// M / (sqrt(V) + eps) is Adam's update without bias correction.
AdamStep uncorrected(AdamStep step) {
  step.correction1 = step.correction2 = 1.0f;
  return step;
}

void ratio_8bit(Channels& c, const Tensor& r, const Moments& moments, const Tensor& x, const AdamStep& step, float grad_scale,
                bool left) {
  square(r, c.r_squares, grad_scale, left);
  for (int64_t i = 0; i < c.count(); ++i) {
    c.ok[i] = c.r_squares[i] < INFINITY && (c.gradient_norms.empty() || c.gradient_norms[i] < INFINITY);
    c.skipped += !c.ok[i];
  }
  advance_8bit(adam_8bit_of(r, moments, x, uncorrected(step), 1.0f, left), r, c);
  square(x, c.n_squares, 1.0f, left);
  for (int64_t i = 0; i < c.count(); ++i)
    if (!c.ok[i]) c.r_squares[i] = c.n_squares[i] = 0.0f;
}

}  // namespace

Channels adam(const Tensor& r, const Moments& moments, const Tensor& x, const AdamStep& step, float grad_scale, bool left) {
  Channels c;
  c.ok.assign(r.size(left ? 1 : 0), 1);
  if (moments.in_8bit()) {
    const LowRankAdam8bit a = adam_8bit_of(r, moments, x, step, grad_scale, left);
    for_blocks(r, [&](int64_t begin, int64_t end) { blockwise_kernels().mark_channels(a, c.ok.data(), begin, end); });
    c.skipped = std::count(c.ok.begin(), c.ok.end(), 0);
    advance_8bit(a, r, c);
    return c;
  }
  const LowRankAdam a{data<float>(r),
                      data<float>(moments.exp_avg),
                      data<float>(moments.exp_avg_sq),
                      data<float>(x),
                      c.ok.data(),
                      r.size(0),
                      r.size(1),
                      grad_scale,
                      step};
  std::atomic<int64_t> skipped = 0;
  for_channels(r, left, [&](int64_t begin, int64_t end) {
    skipped += (left ? step_kernels().adam_columns : step_kernels().adam_rows)(a, begin, end);
  });
  c.skipped = skipped;
  return c;
}

Channels ratio(const Tensor& r, const Moments& moments, const Tensor* x, const Tensor* limited, const AdamStep& step,
               float grad_scale, bool left) {
  const int64_t channels = r.size(left ? 1 : 0);
  Channels c{std::vector<uint8_t>(channels), 0, std::vector<float>(channels), std::vector<float>(channels), {}};
  if (limited != nullptr) c.gradient_norms = norms_of(*limited, left);
  if (moments.in_8bit()) {
    ratio_8bit(c, r, moments, x ? *x : r, step, grad_scale, left);
    return c;
  }
  const Ratio a{data<float>(r),
                data<float>(moments.exp_avg),
                data<float>(moments.exp_avg_sq),
                x ? data<float>(*x) : nullptr,
                c.r_squares.data(),
                c.n_squares.data(),
                limited ? c.gradient_norms.data() : nullptr,
                c.ok.data(),
                r.size(0),
                r.size(1),
                grad_scale,
                step};
  std::atomic<int64_t> skipped = 0;
  for_channels(r, left, [&](int64_t begin, int64_t end) {
    skipped += (left ? residual_kernels().ratio_columns : residual_kernels().ratio_rows)(a, begin, end);
  });
  c.skipped = skipped;
  return c;
}

}  // namespace lowrank
