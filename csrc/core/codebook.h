// The dynamic map of 8-bit codes (Dettmers et al. 2022) and the nearest code of a value, exactly, by one table lookup.
#pragma once

#include <bit>

#include "block.h"
#include "convert.h"

// Bins are the values with one top half of their fp32 bits, from the smallest midpoint of both maps to 1.
namespace lowrank {

constexpr int kFirstBin = 0x342e, kLastBin = 0x3f80, kBins = kLastBin - kFirstBin + 1;

}  // namespace lowrank

LR_BEGIN

// A map from codes to values in [-1, 1] if SIGNED, else [0, 1], in ascending order. Decade i of seven, [0.1, 1) * 10^(i-6),
// holds the midpoints of 2^i equal parts, with both signs (twice as many parts of one sign if not SIGNED); also 0 and 1.
template <bool SIGNED>
struct Codebook {
  static constexpr int zero = SIGNED ? 127 : 0;  // the code of 0
  static constexpr int magnitudes = SIGNED ? 129 : 256;
  float value[256];
  // Of a bin: its lowest value's rank among the magnitudes << 16 | 0xffff - low half of the bin's midpoint (0xffff: no
  // midpoint). Adding the low half of a value carries into the rank just where the value is above the midpoint.
  uint32_t bin[kBins];
};

template <bool SIGNED>
constexpr Codebook<SIGNED> make_codebook() {
  using Book = Codebook<SIGNED>;
  float magnitude[Book::magnitudes] = {};
  double power[7] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};
  int count = 1;
  for (int decade = 0; decade < 7; ++decade) {
    const int parts = (SIGNED ? 1 : 2) << decade;
    // Each boundary is rounded to fp32 once, from whichever end is nearer, as torch.linspace does.
    const double step = (1.0f - 0.1f) / float(parts);
    const auto boundary = [=](int i) { return i < (parts + 1) / 2 ? float(0.1f + step * i) : float(1 - step * (parts - i)); };
    for (int i = 0; i < parts; ++i) magnitude[count++] = (boundary(i) + boundary(i + 1)) / 2 * float(power[decade]);
  }
  magnitude[count] = 1.0f;

  Book book = {};
  for (int i = 0; i < Book::magnitudes; ++i) {
    book.value[Book::zero + i] = magnitude[i];
    if (SIGNED && i < Book::magnitudes - 1) book.value[Book::zero - i] = -magnitude[i];
  }
  book.value[Book::zero] = 0.0f;
  int rank = 0;
  for (int bin = 0; bin < kBins; ++bin) {
    uint32_t midpoint = 0xffff;
    const int first = rank;
    for (; rank + 1 < Book::magnitudes; ++rank) {
      const uint32_t bits = std::bit_cast<uint32_t>((magnitude[rank] + magnitude[rank + 1]) / 2);
      if (bits >> 16 != uint32_t(kFirstBin + bin)) break;
      if (rank > first) throw "two midpoints in one bin";
      midpoint = bits & 0xffff;
    }
    book.bin[bin] = uint32_t(first) << 16 | (0xffff - midpoint);
  }
  if (rank + 1 != Book::magnitudes) throw "a midpoint outside of the bins";
  return book;
}

// The code of the value nearest to y in [-1.007, 1.007]; of two that are equally near, the lower one. A midpoint is the mean
// of its neighbours in fp32.
template <bool SIGNED>
LR_HD uint8_t nearest_code(const Codebook<SIGNED>& book, float y) {
  const int32_t bits = int32_t(float_bits(y)), negative = SIGNED ? int32_t(uint32_t(bits) >> 31) : 0;
  // The lower of two negative codes has the larger magnitude: as if |y| were one bit larger.
  const int32_t magnitude = SIGNED ? (bits & 0x7fffffff) + negative : bits;
  const int32_t least = kFirstBin << 16, a = magnitude > least ? magnitude : least;
  const int32_t rank = int32_t((book.bin[(a >> 16) - kFirstBin] + uint32_t(a & 0xffff)) >> 16);
  if constexpr (!SIGNED) return uint8_t(rank);
  const int32_t most = 128 - negative, kept = rank < most ? rank : most;  // there is no -1
  return uint8_t(127 + (kept ^ -negative) + negative);
}

LR_END
