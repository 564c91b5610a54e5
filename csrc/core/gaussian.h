// A Gaussian basis from its seed (Flora, APOLLO): every value is a function of (seed, refresh, parameter, row, column), made of
// additions, products and square roots of fp32 in a fixed order, so that all backends make the same bits.
#pragma once

#include "block.h"
#include "convert.h"
#include "philox.h"

namespace lowrank {

// B (d, rank) of N(0, 1/rank). `gain` is 1/sqrt(rank). Outside LR_BEGIN: kernels of every instruction set take it.
struct GaussianBasis {
  uint64_t seed;
  uint32_t refresh, parameter;
  int64_t rank;
  float gain;
};

}  // namespace lowrank

LR_BEGIN

LR_HD GaussianBasis gaussian_basis(int64_t seed, int64_t refresh, int64_t parameter, int64_t rank) {
  return {uint64_t(seed), uint32_t(refresh), uint32_t(parameter), rank, float(1.0 / sqrt(double(rank)))};
}

// A counter of Philox serves four rows that lie kRows apart, so that neighbours in a row come from neighbouring counters.
constexpr int kRows = 16, kGroup = 4 * kRows;
// The counters of a basis have this bit of their second word, those of random_group do not.
constexpr uint32_t kGaussianTag = 0x80000000u;

// -2 ln u for u in (0, 1): u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), and a polynomial in f.
LR_HD float minus_two_log(float u) {
  const uint32_t shifted = float_bits(u) + (0x3f800000u - 0x3f3504f3u);
  const float e = float(int32_t(shifted >> 23) - 127);
  const float f = bits_float((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  float p = -0.10082372f;
  p = p * f + 0.161805f;
  p = p * f + -0.17243226f;
  p = p * f + 0.19906883f;
  p = p * f + -0.24971228f;
  p = p * f + 0.33334715f;
  p = p * f + -0.50000323f;
  return (e * 0.69314718f + (f + f * f * p)) * -2.0f;
}

struct NormalPair {
  float a, b;
};

// Box-Muller: two words to two independent normals. 23 bits of the first give the radius; of the second, two bits give the
// quadrant and 22 the angle within it.
LR_HD NormalPair normal_pair(uint32_t first, uint32_t second) {
  const float u = (float(int32_t(first >> 9)) + 0.5f) * 0x1p-23f;
  const float radius = sqrtf(minus_two_log(u));
  const float t = (float(int32_t(second >> 8 & 0x3fffffu)) + 0.5f) * 0x1p-22f - 0.5f;
  const float y = t * t;
  float sine = -0.00460218f, cosine = 9.0677127e-4f;
  sine = sine * y + 0.07968023f;
  sine = sine * y + -0.64596348f;
  sine = (sine * y + 1.57079632f) * t;
  cosine = cosine * y + -0.020861542f;
  cosine = cosine * y + 0.25366945f;
  cosine = cosine * y + -1.23370055f;
  cosine = cosine * y + 1.0f;
  const bool odd = second >> 30 & 1, upper = second >> 31;
  const float x = odd ? sine : cosine, z = odd ? cosine : sine;
  return {radius * (odd != upper ? -x : x), radius * (upper ? -z : z)};
}

constexpr int kWide = 64;

// The words of the counters first ... first + 63.
struct PhiloxWords {
  LR_HD static void draw(const GaussianBasis& b, uint64_t first, uint32_t (&words)[4][kWide]) {
    LR_SIMD
    for (int j = 0; j < kWide; ++j) {
      const uint64_t counter = first + uint64_t(j);
      const Philox bits = philox(uint32_t(counter), uint32_t(counter >> 32) | kGaussianTag, b.refresh, b.parameter, b.seed);
      for (int k = 0; k < 4; ++k) words[k][j] = bits.word[k];
    }
  }
};

// Of the 64 rows from group * 64 on, those inside [begin, end), and `columns` <= 64 columns from `column` on. out[0] belongs to
// (begin, column); rows are `stride` apart. Words draws the random words: a faster one may take the place of PhiloxWords.
template <class Words, class Block, class T>
LR_HD void gaussian_rows(const Block& block, T* out, int64_t stride, int64_t group, int64_t column, int columns, int64_t begin,
                         int64_t end, const GaussianBasis& b) {
  for (int unit = block.tid; unit < kRows; unit += Block::threads) {
    uint32_t words[4][kWide];
    float values[4][kWide];
    Words::draw(b, uint64_t(group * kRows + unit) * uint64_t(b.rank) + uint64_t(column), words);
    LR_SIMD
    for (int j = 0; j < kWide; ++j) {
      const NormalPair low = normal_pair(words[0][j], words[1][j]), high = normal_pair(words[2][j], words[3][j]);
      values[0][j] = low.a * b.gain;
      values[1][j] = low.b * b.gain;
      values[2][j] = high.a * b.gain;
      values[3][j] = high.b * b.gain;
    }
    for (int k = 0; k < 4; ++k) {
      const int64_t row = group * kGroup + k * kRows + unit;
      if (row < begin || row >= end) continue;
      T* to = out + (row - begin) * stride;
      LR_SIMD
      for (int j = 0; j < columns; ++j) to[j] = from_float<T>(values[k][j]);
    }
  }
}

LR_END
