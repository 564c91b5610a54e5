// Rows of a stored matrix to fp32 and back.
#pragma once

#include "block.h"
#include "rounding.h"

LR_BEGIN

template <class Block, class T>
LR_HD void widen_row(const Block& block, const T* from, float* to, int64_t n) {
  LR_SIMD
  for (int64_t i = block.tid; i < n; i += Block::threads) to[i] = to_float(from[i]);
}

// w <- decay * w + alpha * update where ok (everywhere if ok is null). decay = 0 does not read w, as in BLAS.
template <class Block, class W, class Rounded = ToNearest>
LR_HD void apply_row(const Block& block, W* w, const float* update, const uint8_t* ok, int64_t n, float decay, float alpha,
                     Rounded rounding = {}) {
  LR_SIMD
  for (int64_t i = block.tid; i < n; i += Block::threads) {
    const float kept = decay == 0.0f ? 0.0f : decay * to_float(w[i]);
    const W next = rounding.template at<1>(i).template round<W>(kept + alpha * update[i], 0);
    w[i] = choose(ok == nullptr || ok[i], next, w[i]);
  }
}

// w <- x, n elements, V at a time.
template <int V, class Block, class W, class Rounded>
LR_HD void round_row(const Block& block, W* w, const float* x, int64_t n, Rounded rounding) {
  const int64_t whole = V > 1 ? n / V * V : 0;
  for (int64_t i = block.tid * V; i < whole; i += Block::threads * V) {
    const auto pack = load<V>(x + i);
    const auto draw = rounding.template at<V>(i);
    store_each<V>(w + i, [&](int e) { return draw.template round<W>(pack.at[e], e); });
  }
  LR_SIMD
  for (int64_t i = whole + block.tid; i < n; i += Block::threads) w[i] = rounding.template at<1>(i).template round<W>(x[i], 0);
}

LR_END
