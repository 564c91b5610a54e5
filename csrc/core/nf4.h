// NF4 weights (Dettmers et al. 2023): value = absmax * level of a code, one absmax for each group of neighbours in a row. Byte i
// of a row holds element 2 i in its high nibble and 2 i + 1 in its low one, as bitsandbytes packs them.
#pragma once

#include "int8.h"

namespace lowrank {

// Groups are even, so that they begin with a byte.
using Nf4Matrix = Coded<uint8_t, 2>;

}  // namespace lowrank

LR_BEGIN

// The code of 0, which also fills up a row of odd length.
constexpr uint32_t kNf4Zero = 7;

// Selections, not a table: they vectorise, and take no memory on a GPU.
constexpr LR_HD float nf4_level(uint32_t code) {
  const bool a = code & 1, b = code & 2, c = code & 4;
  const float below = c ? (b ? (a ? 0.0f : -0.09105003625154495f) : (a ? -0.18477343022823334f : -0.28444138169288635f))
                        : (b ? (a ? -0.39491748809814453f : -0.5250730514526367f) : (a ? -0.6961928009986877f : -1.0f));
  const float above =
      c ? (b ? (a ? 1.0f : 0.7229568362236023f) : (a ? 0.5626170039176941f : 0.44070982933044434f))
        : (b ? (a ? 0.33791524171829224f : 0.24611230194568634f) : (a ? 0.16093020141124725f : 0.07958029955625534f));
  return code & 8 ? above : below;
}

// The code of the level nearest to y in [-1, 1]; of two that are equally near, the lower one. A midpoint is the mean of its
// neighbours in fp32.
template <uint32_t FROM = 0>
LR_HD uint32_t nf4_code(float y) {
  if constexpr (FROM == 15) {
    return 0;
  } else {
    constexpr float midpoint = (nf4_level(FROM) + nf4_level(FROM + 1)) / 2;
    return uint32_t(y > midpoint) + nf4_code<FROM + 1>(y);
  }
}

// Nearest codes of n values. A group of zeros or denormals is all 0; one with a NaN or infinity has codes of 0 and absmax NaN.
template <int V, class Block, class W>
LR_HD void quantize_group(const Block& block, const W* w, int n, uint8_t* packed, float* absmax) {
  const uint32_t largest = largest_magnitude<V>(block, w, n);
  const float scale = int8_scale(largest, 1.0f), inverse = int8_inverse(scale);
  // NaN times 0 has no code.
  const bool finite = largest <= float_bits(kLargestFloat);
  const auto code = [=](W x) { return finite ? nf4_code(to_float(x) * inverse) : kNf4Zero; };
  if constexpr (V == 1) {
    LR_SIMD
    for (int i = block.tid; i < n / 2; i += Block::threads) packed[i] = uint8_t(code(w[2 * i]) << 4 | code(w[2 * i + 1]));
    if (n % 2 != 0 && block.tid == 0) packed[n / 2] = uint8_t(code(w[n - 1]) << 4 | kNf4Zero);
  } else {
    for (int i = block.tid * V; i < n; i += Block::threads * V) {
      const auto pack = load<V>(w + i);
      Pack<uint8_t, V / 2> out;
      for (int e = 0; e < V / 2; ++e) out.at[e] = uint8_t(code(pack.at[2 * e]) << 4 | code(pack.at[2 * e + 1]));
      store(packed + i / 2, out);
    }
  }
  if (block.tid == 0) *absmax = scale;
}

template <int V, class Block, class W>
LR_HD void dequantize_group(const Block& block, const uint8_t* packed, float absmax, int n, W* w) {
  const auto value = [=](uint32_t code) { return from_float<W>(nf4_level(code) * absmax); };
  if constexpr (V == 1) {
    LR_SIMD
    for (int i = block.tid; i < n / 2; i += Block::threads) {
      w[2 * i] = value(packed[i] >> 4);
      w[2 * i + 1] = value(packed[i] & 15);
    }
    if (n % 2 != 0 && block.tid == 0) w[n - 1] = value(packed[n / 2] >> 4);
  } else {
    for (int i = block.tid * V; i < n; i += Block::threads * V) {
      const auto pack = load<V / 2>(packed + i / 2);
      Pack<W, V> out;
      for (int e = 0; e < V / 2; ++e) out.at[2 * e] = value(pack.at[e] >> 4), out.at[2 * e + 1] = value(pack.at[e] & 15);
      store(w + i, out);
    }
  }
}

LR_END
