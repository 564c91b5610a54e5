// Philox 4x32-10 (Salmon et al. 2011): random bits as a function of (seed, element, step, parameter), with no state.
#pragma once

#include "common.h"

LR_BEGIN

// What the counter says beside the element: key = seed, counter = (element / 8, step, parameter).
struct RandomStream {
  uint64_t seed;
  uint32_t step, parameter;
};

// The counter's step from a number of any type: modulo 2^32.
LR_HD uint32_t counter_step(double step) { return fabs(step) < 0x1p62 ? uint32_t(int64_t(step)) : 0u; }

struct Philox {
  uint32_t word[4];
};

LR_HD Philox philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  LR_UNROLL(10)
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c3 = uint32_t(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The random bits of the eight elements 8 * group ... 8 * group + 7.
LR_HD Philox random_group(const RandomStream& stream, uint64_t group) {
  return philox(uint32_t(group), uint32_t(group >> 32), stream.step, stream.parameter, stream.seed);
}

// The 16 bits of element 8 * group + i: the low half of word i / 2 for even i, the high half for odd i.
LR_HD uint32_t random16(const Philox& group, int i) { return (group.word[i / 2] >> (i % 2 * 16)) & 0xffff; }

LR_END
