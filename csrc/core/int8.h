// INT8 weights: value = scale * code, codes from -127 to 127, one scale for each group of neighbours in a row.
#pragma once

#include "block.h"
#include "coded.h"
#include "convert.h"
#include "philox.h"

namespace lowrank {

using Int8Matrix = Coded<int8_t, 1>;

// W <- decay * W + alpha * update
struct Int8Update {
  float alpha, decay;
};

}  // namespace lowrank

LR_BEGIN

constexpr int kLargestGroup = 1024;
// A new scale maps the largest value to code 119 of 127: 1/16 of the range is headroom.
constexpr float kCodeRange = 127.0f, kUnit = 1.0f / 119.0f;
constexpr float kLeastScale = 0x1p-126f, kLargestFloat = 0x1.fffffep127f;

LR_HD bool is_finite(float x) { return fabsf(x) <= kLargestFloat; }

// |x| as a number that orders like it, with NaN above infinity: unlike a maximum of floats, it vectorises and keeps NaN.
LR_HD uint32_t magnitude(float x) { return float_bits(x) & 0x7fffffffu; }

// The scale of a group by its largest magnitude: 0 if it would be denormal, NaN if that is not finite.
LR_HD float int8_scale(uint32_t largest, float unit = kUnit) {
  const float scale = bits_float(largest) * unit;
  return largest > float_bits(kLargestFloat) ? bits_float(0x7fc00000u) : scale >= kLeastScale ? scale : 0.0f;
}

// What divides by a scale that is a normal number; 0 for any other.
LR_HD float int8_inverse(float scale) { return scale >= kLeastScale && scale <= kLargestFloat ? 1.0f / scale : 0.0f; }

// The largest of one number a thread.
template <class Block>
LR_HD uint32_t max_threads(const Block& block, uint32_t mine) {
  if constexpr (Block::threads > 1) {
    block.lanes[block.tid] = bits_float(mine);
    for (int half = Block::threads / 2; half > 0; half /= 2) {
      block.sync();
      if (block.tid < half) {
        const uint32_t a = float_bits(block.lanes[block.tid]), b = float_bits(block.lanes[block.tid + half]);
        block.lanes[block.tid] = bits_float(a > b ? a : b);
      }
    }
    block.sync();
    mine = float_bits(block.lanes[0]);
    block.sync();
  }
  return mine;
}

// The largest magnitude of n values.
template <int V, class Block, class W>
LR_HD uint32_t largest_magnitude(const Block& block, const W* w, int n) {
  uint32_t largest = 0;
  LR_SIMD_MAX(largest)
  for (int i = block.tid * V; i < n; i += Block::threads * V) {
    const auto pack = load<V>(w + i);
    for (int e = 0; e < V; ++e) {
      const uint32_t size = magnitude(to_float(pack.at[e]));
      largest = size > largest ? size : largest;
    }
  }
  return max_threads(block, largest);
}

// Nearest codes of n values, ties to even. A group of zeros or denormals is all 0; one with a NaN or infinity has codes 0 and
// the scale NaN.
template <int V, class Block, class W>
LR_HD void quantize_group(const Block& block, const W* w, int n, int8_t* codes, float* scale) {
  const uint32_t largest = largest_magnitude<V>(block, w, n);
  const float group_scale = int8_scale(largest), inverse = int8_inverse(group_scale);
  // NaN times 0 has no code.
  const bool finite = largest <= float_bits(kLargestFloat);
  LR_SIMD
  for (int i = block.tid * V; i < n; i += Block::threads * V) {
    const auto pack = load<V>(w + i);
    Pack<int8_t, V> out;
    for (int e = 0; e < V; ++e) out.at[e] = int8_t(finite ? int32_t(rintf(to_float(pack.at[e]) * inverse)) : 0);
    store(codes + i, out);
  }
  if (block.tid == 0) *scale = group_scale;
}

template <int V, class Block, class W>
LR_HD void dequantize_group(const Block& block, const int8_t* codes, float scale, int n, W* w) {
  LR_SIMD
  for (int i = block.tid * V; i < n; i += Block::threads * V) {
    if constexpr (V == 1) {
      w[i] = from_float<W>(float(codes[i]) * scale);
    } else {
      const auto pack = load<V>(codes + i);
      Pack<W, V> out;
      for (int e = 0; e < V; ++e) out.at[e] = from_float<W>(float(pack.at[e]) * scale);
      store(w + i, out);
    }
  }
}

// The random bits of the elements first ... first + n - 1, from bits[first % 8] on; `bits` is on 16 bytes, whole groups of 8.
template <class Block>
LR_HD void random_bits(const Block& block, const RandomStream& stream, uint64_t first, int n, uint16_t* bits) {
  const int groups = (int(first % 8) + n + 7) / 8;
  for (int i = block.tid; i < groups; i += Block::threads) {
    const Philox words = random_group(stream, first / 8 + uint64_t(i));
    for (int e = 0; e < 8; ++e) bits[8 * i + e] = uint16_t(random16(words, e));
  }
}

// y in fixed point with 16 bits of fraction, rounded up to the next code iff u < that fraction, u = random / 2^16.
// |y| <= 127.
LR_HD int8_t round_up_or_down(float y, uint16_t random) {
  const int32_t fixed = int32_t(rintf(y * 0x1p16f));
  return int8_t((fixed + (0xffff - int32_t(random))) >> 16);
}

// The new value of an element in units of its scale: exactly the code where nothing is added and decay = 1.
LR_HD float int8_target(int8_t code, float update, float inverse, Int8Update u) {
  const float step = u.alpha * update, kept = float(code);
  return is_finite(step) ? u.decay * kept + step * inverse : kept;
}

// The same as a value: what a new scale is made from. Not finite: the old value.
LR_HD float int8_value(int8_t code, float update, float scale, Int8Update u) {
  const float kept = float(code) * scale, value = u.decay * kept + u.alpha * update;
  return is_finite(value) ? value : kept;
}

// An element's new number and its old one, in units of the scale (factor = 1 / scale) or as values (factor = scale).
template <bool VALUES>
LR_HD float int8_new(int8_t code, float update, float factor, Int8Update u) {
  return VALUES ? int8_value(code, update, factor, u) : int8_target(code, update, factor, u);
}

template <bool VALUES>
LR_HD float int8_old(int8_t code, float factor) {
  return VALUES ? float(code) * factor : float(code);
}

// The largest magnitude of a group's new numbers, and whether any of them is not the old one.
struct Int8Extent {
  uint32_t largest, moved;
};

template <int V, bool VALUES, class Block, class G>
LR_HD Int8Extent int8_extent(const Block& block, const int8_t* codes, const G* update, int n, float factor, Int8Update u) {
  uint32_t largest = 0, moved = 0;
  LR_SIMD_MAX(largest, moved)
  for (int i = block.tid * V; i < n; i += Block::threads * V) {
    const auto code = load<V>(codes + i);
    const auto pack = load<V>(update + i);
    for (int e = 0; e < V; ++e) {
      const float y = int8_new<VALUES>(code.at[e], to_float(pack.at[e]), factor, u);
      const uint32_t size = magnitude(y), differs = y != int8_old<VALUES>(code.at[e], factor) ? 1u : 0u;
      largest = size > largest ? size : largest;
      moved = differs > moved ? differs : moved;
    }
  }
  return {max_threads(block, largest), max_threads(block, moved)};
}

// codes <- new numbers times `inverse` (of the new scale, where they are values), rounded with the bits in `random`.
template <int V, bool VALUES, class Block, class G>
LR_HD void int8_round(const Block& block, int8_t* codes, const G* update, const uint16_t* random, int n, float factor,
                      float inverse, Int8Update u) {
  LR_SIMD
  for (int i = block.tid * V; i < n; i += Block::threads * V) {
    auto code = load<V>(codes + i);
    const auto pack = load<V>(update + i);
    const auto draw = load<V>(random + i);
    for (int e = 0; e < V; ++e) {
      const float y = int8_new<VALUES>(code.at[e], to_float(pack.at[e]), factor, u);
      code.at[e] = round_up_or_down(VALUES ? y * inverse : y, draw.at[e]);
    }
    store(codes + i, code);
  }
}

// W <- decay * W + alpha * update for one group of n, rounded stochastically; draw(block) returns its n random numbers, which
// all threads see after a sync(). Returns whether the group has a new scale.
//
// The scale is kept while every value fits and the largest is at least half of the range; otherwise the group gets a new one.
// A group in which nothing moves keeps its bytes. An element whose alpha * update or new value is not finite keeps its value.
template <int V, class Block, class G, class Draw>
LR_HD bool update_group(const Block& block, int8_t* codes, float* scale, const G* update, int n, Int8Update u, const Draw& draw) {
  const float old_scale = *scale, inverse = int8_inverse(old_scale);
  bool keep = inverse != 0.0f;
  if (keep) {
    const Int8Extent extent = int8_extent<V, false>(block, codes, update, n, inverse, u);
    if (!extent.moved) return false;
    keep = extent.largest <= float_bits(kCodeRange) && extent.largest >= float_bits(0.5f * kCodeRange);
  }
  if (keep) {
    const uint16_t* random = draw(block);
    block.sync();
    int8_round<V, false>(block, codes, update, random, n, inverse, 1.0f, u);
  } else {
    const Int8Extent extent = int8_extent<V, true>(block, codes, update, n, old_scale, u);
    if (!extent.moved || extent.largest > float_bits(kLargestFloat)) return false;
    const float new_scale = int8_scale(extent.largest);
    // No thread reads the old scale any more: the extent waited for all.
    if (block.tid == 0) *scale = new_scale;
    const uint16_t* random = draw(block);
    block.sync();
    int8_round<V, true>(block, codes, update, random, n, old_scale, int8_inverse(new_scale), u);
  }
  block.sync();
  return !keep;
}

LR_END
