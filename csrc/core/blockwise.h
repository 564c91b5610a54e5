// Blocks of 256 values as 8-bit codes and one fp32 absmax, and Adam on moments that are stored so.
#pragma once

#include "adam.h"
#include "codebook.h"

namespace lowrank {

// A matrix in blocks of at most 256 elements of one row, a row's last may be shorter. A tensor that is cut flat is one row.
struct RowBlocks {
  int64_t rows, columns;
};

}  // namespace lowrank

LR_BEGIN

constexpr int kBlock = 256;
static_assert(kBlock == kLanes);

// The n elements of a block: from `first` on in the matrix, from `column` on in `row`.
struct BlockAt {
  int64_t first, row, column;
  int n;
};

LR_HD int64_t blocks_per_row(const RowBlocks& in) { return (in.columns + kBlock - 1) / kBlock; }

LR_HD int64_t block_count(const RowBlocks& in) { return in.rows * blocks_per_row(in); }

LR_HD BlockAt block_at(const RowBlocks& in, int64_t i) {
  const int64_t per_row = blocks_per_row(in), row = in.rows == 1 ? 0 : i / per_row, column = (i - row * per_row) * kBlock;
  const int64_t rest = in.columns - column;
  return {row * in.columns + column, row, column, int(rest < kBlock ? rest : kBlock)};
}

// Whether a block can be taken V elements at a time where the matrix begins on as many.
template <int V>
LR_HD bool in_vectors(const BlockAt& at) {
  return at.first % V == 0 && at.n % V == 0;
}

// Calls f(k) for the lanes k < owned of this thread, V at a time. A GPU thread's loop has a fixed length, so that arrays stay
// in its registers.
template <int V, class Block, class F>
LR_HD void for_owned(int owned, const F& f) {
  if constexpr (Block::threads == 1) {
    LR_SIMD
    for (int k = 0; k < owned; k += V) f(k);
  } else {
    LR_UNROLL(kOwned<Block>)
    for (int k = 0; k < kOwned<Block>; k += V)
      if (k < owned) f(k);
  }
}

// How many of the n lanes of a block, a multiple of V, this thread owns.
template <int V, class Block>
LR_HD int owned_lanes(const Block& block, int n) {
  return n > block.tid * V ? ((n / V - 1 - block.tid) / Block::threads + 1) * V : 0;
}

// |x|, infinity for NaN.
LR_HD uint32_t magnitude_bits(float x) {
  const uint32_t bits = float_bits(x) & 0x7fffffff;
  return bits < 0x7f800000 ? bits : 0x7f800000;
}

// What a block stores as its absmax, and what its values are multiplied by: 0 where all codes are to be those of 0.
struct BlockScale {
  float absmax, inverse;
};

// From the largest |x| of a block, which is infinity or NaN if not all are finite. A block of zeros or denormals is a block of
// zeros; one that is not finite decodes to NaN.
LR_HD BlockScale block_scale(float most) {
  const uint32_t bits = float_bits(most);
  if (bits >= 0x7f800000) return {bits_float(0x7fc00000), 0.0f};
  if (bits < 0x00800000) return {0.0f, 0.0f};
  return {most, 1.0f / most};
}

// Stores the owned values of a block as codes, and its absmax. Values are multiplied by 1 / absmax, rounded once.
template <int V, bool SIGNED, class Block>
LR_HD void encode_block(const Block& block, const Codebook<SIGNED>& book, const float* values, uint8_t* codes, float* absmax,
                        int owned) {
  uint32_t bits = 0;
  for_owned<1, Block>(owned, [&](int k) {
    const uint32_t mine = magnitude_bits(values[k]);
    bits = mine > bits ? mine : bits;
  });
  const BlockScale scale = block_scale(max_threads(block, bits_float(bits)));
  if (block.tid == 0) *absmax = scale.absmax;
  for_owned<V, Block>(owned, [&](int k) {
    store_each<V>(codes + lane_of<V>(block, k),
                  [&](int e) { return nearest_code(book, scale.inverse == 0.0f ? 0.0f : values[k + e] * scale.inverse); });
  });
}

template <int V, bool SIGNED, class Block>
LR_HD void decode_block(const Block& block, const Codebook<SIGNED>& book, const uint8_t* codes, float absmax, float* values,
                        int owned) {
  for_owned<V, Block>(owned, [&](int k) {
    load_each<V>(codes + lane_of<V>(block, k), [&](int e, uint8_t code) { values[k + e] = book.value[code] * absmax; });
  });
}

// A block of n <= 256 values x.
template <int V, bool SIGNED, class Block, class X>
LR_HD void quantize_block(const Block& block, const Codebook<SIGNED>& book, const X* x, uint8_t* codes, float* absmax, int n) {
  float values[kOwned<Block>];
  const int owned = owned_lanes<V>(block, n);
  for_owned<V, Block>(
      owned, [&](int k) { load_each<V>(x + lane_of<V>(block, k), [&](int e, X element) { values[k + e] = to_float(element); }); });
  encode_block<V>(block, book, values, codes, absmax, owned);
}

template <int V, bool SIGNED, class Block>
LR_HD void dequantize_block(const Block& block, const Codebook<SIGNED>& book, const uint8_t* codes, float absmax, float* x, int n) {
  float values[kOwned<Block>];
  const int owned = owned_lanes<V>(block, n);
  decode_block<V>(block, book, codes, absmax, values, owned);
  for_owned<V, Block>(owned, [&](int k) { store_each<V>(x + lane_of<V>(block, k), [&](int e) { return values[k + e]; }); });
}

LR_END
