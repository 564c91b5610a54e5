// How a weight of 16 bits takes its new fp32 value: rounded to nearest, or stochastically, up in magnitude with the probability of
// what truncation would drop.
#pragma once

#include "convert.h"
#include "philox.h"

LR_BEGIN

// x rounded up in magnitude iff u < frac(x), with u of 16 bits: a number that W holds stays. Beyond the largest finite number, and
// for NaN, as to nearest. fp32 takes x as it is.
template <class W>
LR_HD W from_float_stochastic(float x, uint32_t random);

template <>
LR_HD float from_float_stochastic<float>(float x, uint32_t) {
  return x;
}

template <>
LR_HD bf16 from_float_stochastic<bf16>(float x, uint32_t random) {
  const uint32_t u = float_bits(x);
  const bool finite = (u & 0x7fffffff) <= 0x7f7f0000u;
  return choose(finite, bf16{uint16_t((u + (0xffffu - random)) >> 16)}, from_float<bf16>(x));
}

template <>
LR_HD fp16 from_float_stochastic<fp16>(float x, uint32_t random) {
  const uint32_t u = float_bits(x), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  const uint32_t normal = (magnitude - 0x38000000u + (0x1fffu - (random >> 3))) >> 13;
  // Subnormal: units of 2^-24, in fixed point with 16 bits of fraction.
  const bool small = magnitude < 0x38800000u;
  const uint32_t fixed = uint32_t(int32_t(rintf(bits_float(small ? magnitude : 0u) * 0x1p40f)));
  const uint32_t subnormal = (fixed + (0xffffu - random)) >> 16;
  const fp16 rounded{uint16_t(sign | (small ? subnormal : normal))};
  return choose(magnitude <= 0x477fe000u, rounded, from_float<fp16>(x));
}

// Whether weights are rounded stochastically, and then with which bits: those of the element `first` of an unsharded tensor go to
// the first weight.
struct Rounding {
  bool stochastic = false;
  RandomStream stream = {};
  uint64_t first = 0;

  // Of the weights from the i-th on.
  LR_HD Rounding at(int64_t i) const { return {stochastic, stream, first + uint64_t(i)}; }
};

// What an algorithm rounds with. run(i, n): for the n weights from i on alone. at<V>(i).round<W>(x, e): x for weight i + e, e < V.
struct ToNearest {
  LR_HD ToNearest run(int64_t, int64_t) const { return {}; }

  template <int V>
  LR_HD ToNearest at(int64_t) const {
    return {};
  }

  template <class W>
  LR_HD W round(float x, int) const {
    return from_float<W>(x);
  }
};

// With bits that are there, a number a weight.
struct WithBits {
  const uint16_t* bits;

  LR_HD WithBits run(int64_t i, int64_t) const { return {bits + i}; }

  template <int V>
  LR_HD WithBits at(int64_t i) const {
    return {bits + i};
  }

  template <class W>
  LR_HD W round(float x, int e) const {
    return from_float_stochastic<W>(x, bits[e]);
  }
};

// The bits of V neighbours.
template <int V>
struct Drawn {
  uint32_t bits[V];

  template <class W>
  LR_HD W round(float x, int e) const {
    return from_float_stochastic<W>(x, bits[e]);
  }
};

// With bits that are drawn where they are needed.
struct Drawing {
  RandomStream stream;
  uint64_t first;

  LR_HD Drawing run(int64_t i, int64_t) const { return {stream, first + uint64_t(i)}; }

  template <int V>
  LR_HD Drawn<V> at(int64_t i) const {
    static_assert(8 % V == 0);
    const uint64_t element = first + uint64_t(i);
    const int begin = int(element % 8);
    Drawn<V> drawn;
    Philox words = random_group(stream, element / 8);
    for (int e = 0; e < V; ++e) drawn.bits[e] = random_of(words, begin + e);
    if (begin + V > 8) {
      words = random_group(stream, element / 8 + 1);
      for (int e = 0; e < V; ++e) drawn.bits[e] = begin + e < 8 ? drawn.bits[e] : random_of(words, begin + e - 8);
    }
    return drawn;
  }

 private:
  // random16, without an index into registers; i modulo 8.
  LR_HD static uint32_t random_of(const Philox& words, int i) {
    const uint32_t low = i & 2 ? words.word[1] : words.word[0], high = i & 2 ? words.word[3] : words.word[2];
    return ((i & 4 ? high : low) >> (i % 2 * 16)) & 0xffff;
  }
};

LR_END
