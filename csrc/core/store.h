// Rows of a stored matrix to fp32 and back.
#pragma once

#include "block.h"
#include "convert.h"

LR_BEGIN

template <class Block, class T>
LR_HD void widen_row(const Block& block, const T* from, float* to, int64_t n) {
  LR_SIMD
  for (int64_t i = block.tid; i < n; i += Block::threads) to[i] = to_float(from[i]);
}

// w <- decay * w + alpha * update where ok (everywhere if ok is null). decay = 0 does not read w, as in BLAS.
template <class Block, class W>
LR_HD void apply_row(const Block& block, W* w, const float* update, const uint8_t* ok, int64_t n, float decay, float alpha) {
  LR_SIMD
  for (int64_t i = block.tid; i < n; i += Block::threads) {
    const float kept = decay == 0.0f ? 0.0f : decay * to_float(w[i]);
    const W next = from_float<W>(kept + alpha * update[i]);
    w[i] = choose(ok == nullptr || ok[i], next, w[i]);
  }
}

LR_END
