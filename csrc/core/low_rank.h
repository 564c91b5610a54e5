// Adam on a low-rank gradient R, channel by channel. A channel with one unusable value keeps its moments, and its X is NaN.
#pragma once

#include "adam.h"
#include "block.h"

LR_BEGIN

LR_HD void low_rank_element(bool ok, float g, float& m, float& v, float& x, const AdamStep& s) {
  float new_m = m, new_v = v;
  const float update = adam_update(g, new_m, new_v, s);
  m = ok ? new_m : m;
  v = ok ? new_v : v;
  x = ok ? update : NAN;
}

// Channels are columns: `columns` <= 256 neighbours of matrices with `rows` rows, `stride` apart. ok[c] says whether column
// c was usable. x may be r. Returns how many columns of this thread were left out.
template <class Block>
LR_HD int adam_columns(const Block& block, const float* r, float* m, float* v, float* x, uint8_t* ok, int64_t rows, int columns,
                       int64_t stride, float grad_scale, AdamStep s) {
  const int owned = columns > block.tid ? (columns - 1 - block.tid) / Block::threads + 1 : 0;
  float bad[kOwned<Block>] = {};
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = r + i * stride + block.tid;
    LR_SIMD
    for (int k = 0; k < owned; ++k) bad[k] += usable(row[k * Block::threads] * grad_scale) ? 0.0f : 1.0f;
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t first = i * stride + block.tid;
    LR_SIMD
    for (int k = 0; k < owned; ++k) {
      const int64_t at = first + k * Block::threads;
      low_rank_element(bad[k] == 0.0f, r[at] * grad_scale, m[at], v[at], x[at], s);
    }
  }
  int skipped = 0;
  for (int k = 0; k < owned; ++k) {
    ok[block.tid + k * Block::threads] = bad[k] == 0.0f;
    skipped += bad[k] != 0.0f;
  }
  return skipped;
}

// The channel is one row of n elements; returns whether it was usable. x may be r.
template <class Block>
LR_HD bool adam_row(const Block& block, const float* r, float* m, float* v, float* x, int64_t n, float grad_scale, AdamStep s) {
  float bad = 0.0f;
  LR_SIMD_SUM(bad)
  for (int64_t i = block.tid; i < n; i += Block::threads) bad += usable(r[i] * grad_scale) ? 0.0f : 1.0f;
  const bool ok = sum_threads(block, bad) == 0.0f;
  LR_SIMD
  for (int64_t i = block.tid; i < n; i += Block::threads) low_rank_element(ok, r[i] * grad_scale, m[i], v[i], x[i], s);
  return ok;
}

LR_END
