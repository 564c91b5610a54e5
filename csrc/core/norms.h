// 2-norms of rows and columns: squares are added in 256 virtual lanes, the lanes in a fixed tree.
#pragma once

#include "block.h"
#include "convert.h"

LR_BEGIN

template <class G>
LR_HD float square(G g) {
  const float x = to_float(g);
  return x * x;
}

// 2-norm of n contiguous elements, V at a time; lane l adds the elements i with i % 256 == l.
template <int V, class Block, class G>
LR_HD float row_norm(const Block& block, const G* g, int64_t n) {
  static_assert(kOwned<Block> % V == 0);
  float sums[kOwned<Block>] = {};
  const int64_t whole = n / kLanes * kLanes;
  LR_UNROLL(4)
  for (int64_t base = 0; base < whole; base += kLanes) {
    LR_SIMD
    for (int k = 0; k < kOwned<Block>; k += V) {
      const auto pack = load<V>(g + base + lane_of<V>(block, k));
      for (int e = 0; e < V; ++e) sums[k + e] += square(pack.at[e]);
    }
  }
  for (int k = 0; k < kOwned<Block>; ++k)
    if (whole + lane_of<V>(block, k) < n) sums[k] += square(g[whole + lane_of<V>(block, k)]);
  sum_lanes<V>(block, sums, 1);
  const float norm = sqrtf(block.lanes[0]);
  block.sync();
  return norm;
}

constexpr int kColumns = 32;

// 2-norms of `columns` <= 32 * TILES neighbouring columns; in a tile of 32 columns, lane l adds column l % 32 of the rows i
// with i % 8 == l / 32.
template <int TILES, class Block, class G>
LR_HD void column_norms(const Block& block, const G* g, float* norms, int64_t rows, int columns, int64_t stride) {
  // A thread owns every step-th column from its first, and `deep` of the eight rows that are read together.
  constexpr int step = Block::threads < kColumns ? Block::threads : kColumns, wide = kColumns / step;
  constexpr int deep = kOwned<Block> / wide, high = kLanes / kColumns;
  const int first = block.tid % kColumns, mine = columns > first ? (columns - 1 - first) / step + 1 : 0;
  const int owned = mine < TILES * wide ? mine : TILES * wide;
  float sums[deep][TILES * wide] = {};
  LR_UNROLL(8)
  for (int64_t base = block.tid / kColumns; base < rows; base += high) {
    for (int k = 0; k < deep; ++k) {
      const int64_t row = base + k * (high / deep);
      if (row >= rows) break;
      LR_SIMD
      for (int j = 0; j < owned; ++j) sums[k][j] += square(g[row * stride + first + j * step]);
    }
  }
  for (int tile = 0; tile * kColumns < columns; ++tile) {
    float partial[kOwned<Block>];
    for (int k = 0; k < kOwned<Block>; ++k) partial[k] = sums[k / wide][tile * wide + k % wide];
    sum_lanes<1>(block, partial, kColumns);
    for (int c = block.tid; c < kColumns && tile * kColumns + c < columns; c += Block::threads)
      norms[tile * kColumns + c] = sqrtf(block.lanes[c]);
    block.sync();
  }
}

// column_norms of a whole tile of 32 columns, whose rows begin on multiples of V elements: the same lanes, V at a time.
template <int V, class Block, class G>
LR_HD void column_tile_norms(const Block& block, const G* g, float* norms, int64_t rows, int64_t stride) {
  static_assert(kOwned<Block> % V == 0 && kColumns % V == 0);
  constexpr int high = kLanes / kColumns;
  const int64_t whole = rows / high * high;
  float sums[kOwned<Block>] = {};
  const auto add = [&](int64_t base, int k) {
    const int lane = lane_of<V>(block, k);
    const auto pack = load<V>(g + (base + lane / kColumns) * stride + lane % kColumns);
    for (int e = 0; e < V; ++e) sums[k + e] += square(pack.at[e]);
  };
  LR_UNROLL(16)
  for (int64_t base = 0; base < whole; base += high)
    for (int k = 0; k < kOwned<Block>; k += V) add(base, k);
  for (int k = 0; k < kOwned<Block>; k += V)
    if (whole + lane_of<V>(block, k) / kColumns < rows) add(whole, k);
  sum_lanes<V>(block, sums, kColumns);
  for (int c = block.tid; c < kColumns; c += Block::threads) norms[c] = sqrtf(block.lanes[c]);
  block.sync();
}

LR_END
