// random_bits of core/int8.h for one thread: several counters at once, the same bits.
#pragma once

#ifdef __AVX2__
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined operand inside its own intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

#include "../core/int8.h"
#include "one_thread.h"

LR_BEGIN

#ifdef __AVX2__
// A word in the low half of each 64-bit lane: products need no shuffles, and what the high halves hold is never read.
#ifdef __AVX512F__
struct Lanes {
  static constexpr int count = 8;
  __m512i x;
  static Lanes of(uint32_t v) { return {_mm512_set1_epi64(v)}; }
  // 0, 4, 1, 5, ...: unpacking pairs of lanes then puts the groups in order.
  static Lanes index() { return {_mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0)}; }
  Lanes operator+(Lanes o) const { return {_mm512_add_epi64(x, o.x)}; }
  Lanes operator*(Lanes o) const { return {_mm512_mul_epu32(x, o.x)}; }
  Lanes operator^(Lanes o) const { return {_mm512_xor_si512(x, o.x)}; }
  Lanes high() const { return {_mm512_srli_epi64(x, 32)}; }
  // The low halves of this and of `o` as one 64-bit word.
  Lanes join(Lanes o) const { return {_mm512_mask_blend_epi32(0xaaaa, x, _mm512_slli_epi64(o.x, 32))}; }
  void store_pairs(Lanes o, uint16_t* out) const {
    _mm512_storeu_si512(out, _mm512_unpacklo_epi64(x, o.x));
    _mm512_storeu_si512(out + 32, _mm512_unpackhi_epi64(x, o.x));
  }
};
#else
struct Lanes {
  static constexpr int count = 4;
  __m256i x;
  static Lanes of(uint32_t v) { return {_mm256_set1_epi64x(v)}; }
  static Lanes index() { return {_mm256_set_epi64x(3, 1, 2, 0)}; }
  Lanes operator+(Lanes o) const { return {_mm256_add_epi64(x, o.x)}; }
  Lanes operator*(Lanes o) const { return {_mm256_mul_epu32(x, o.x)}; }
  Lanes operator^(Lanes o) const { return {_mm256_xor_si256(x, o.x)}; }
  Lanes high() const { return {_mm256_srli_epi64(x, 32)}; }
  Lanes join(Lanes o) const { return {_mm256_blend_epi32(x, _mm256_slli_epi64(o.x, 32), 0xaa)}; }
  void store_pairs(Lanes o, uint16_t* out) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_unpacklo_epi64(x, o.x));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), _mm256_unpackhi_epi64(x, o.x));
  }
};
#endif

// The bits of Lanes::count groups from `group` on; the group number does not pass a multiple of 2^32 on the way.
inline void random_lanes(const RandomStream& stream, uint64_t group, uint16_t* out) {
  const Lanes m0 = Lanes::of(0xD2511F53u), m1 = Lanes::of(0xCD9E8D57u);
  Lanes c0 = Lanes::of(uint32_t(group)) + Lanes::index(), c1 = Lanes::of(uint32_t(group >> 32));
  Lanes c2 = Lanes::of(stream.step), c3 = Lanes::of(stream.parameter);
  uint32_t k0 = uint32_t(stream.seed), k1 = uint32_t(stream.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const Lanes a = m0 * c0, b = m1 * c2;
    c0 = b.high() ^ c1 ^ Lanes::of(k0);
    c1 = b;
    c2 = a.high() ^ c3 ^ Lanes::of(k1);
    c3 = a;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  c0.join(c1).store_pairs(c2.join(c3), out);
}
#endif

// Room for the bits of n elements in whole batches, wherever the first one lies in its group of 8.
constexpr int kRandomRoom = kLargestGroup + 8 + 64;

// As random_bits: the bits of elements first ... first + n - 1 from bits[first % 8] on; n <= kLargestGroup.
inline void random_row(const RandomStream& stream, uint64_t first, int n, uint16_t* bits) {
#ifdef __AVX2__
  const uint64_t group = first / 8;
  const int groups = (int(first % 8) + n + 7) / 8;
  if (uint32_t(group) < 0xffffffffu - uint32_t(groups + Lanes::count)) {
    for (int i = 0; i < groups; i += Lanes::count) random_lanes(stream, group + uint64_t(i), bits + 8 * i);
    return;
  }
#endif
  random_bits(OneThread{nullptr}, stream, first, n, bits);
}

LR_END
