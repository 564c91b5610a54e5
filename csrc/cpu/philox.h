// random_bits of core/int8.h for one thread: several counters at once, the same bits.
#pragma once

#include <vector>

#ifdef __AVX2__
// GCC 12 takes the undefined operands inside its own intrinsics for mistakes.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "../core/int8.h"
#include "../core/rounding.h"
#include "one_thread.h"

// The next loop has a few iterations and indexes registers.
#define LR_UNROLL_CHAINS LR_PRAGMA(GCC unroll 4)

LR_BEGIN

constexpr int kRounds = 10;

#ifdef __AVX2__
// A word in the low half of each 64-bit lane: products need no shuffles, and what the high halves hold is never read.
#ifdef __AVX512F__
struct WordLanes {
  static constexpr int count = 8, chains = 4;
  __m512i x;
  static WordLanes of(uint64_t v) { return {_mm512_set1_epi64(int64_t(v))}; }
  // 0, 4, 1, 5, ...: unpacking pairs of lanes then puts the groups in order.
  static WordLanes index() { return {_mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0)}; }
  WordLanes operator+(WordLanes o) const { return {_mm512_add_epi64(x, o.x)}; }
  WordLanes operator*(WordLanes o) const { return {_mm512_mul_epu32(x, o.x)}; }
  // A shuffle, because shifts share a port with products.
  WordLanes high() const { return {_mm512_shuffle_epi32(x, _MM_PERM_DDBB)}; }
  static WordLanes exclusive_or(WordLanes a, WordLanes b, WordLanes c) { return {_mm512_ternarylogic_epi64(a.x, b.x, c.x, 0x96)}; }
  // The low halves of this and of `o` as one 64-bit word.
  WordLanes join(WordLanes o) const { return {_mm512_mask_blend_epi32(0xaaaa, x, _mm512_slli_epi64(o.x, 32))}; }
  void store_pairs(WordLanes o, uint16_t* out) const {
    _mm512_storeu_si512(out, _mm512_unpacklo_epi64(x, o.x));
    _mm512_storeu_si512(out + 32, _mm512_unpackhi_epi64(x, o.x));
  }
};
#else
struct WordLanes {
  static constexpr int count = 4, chains = 2;
  __m256i x;
  static WordLanes of(uint64_t v) { return {_mm256_set1_epi64x(int64_t(v))}; }
  static WordLanes index() { return {_mm256_set_epi64x(3, 1, 2, 0)}; }
  WordLanes operator+(WordLanes o) const { return {_mm256_add_epi64(x, o.x)}; }
  WordLanes operator*(WordLanes o) const { return {_mm256_mul_epu32(x, o.x)}; }
  WordLanes high() const { return {_mm256_srli_epi64(x, 32)}; }
  static WordLanes exclusive_or(WordLanes a, WordLanes b, WordLanes c) {
    return {_mm256_xor_si256(_mm256_xor_si256(a.x, b.x), c.x)};
  }
  WordLanes join(WordLanes o) const { return {_mm256_blend_epi32(x, _mm256_slli_epi64(o.x, 32), 0xaa)}; }
  void store_pairs(WordLanes o, uint16_t* out) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_unpacklo_epi64(x, o.x));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), _mm256_unpackhi_epi64(x, o.x));
  }
};
#endif

// The keys of all rounds; both are used on the low half of each lane alone.
struct Keys {
  uint64_t at[kRounds][2];
  explicit Keys(uint64_t seed) {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (auto& key : at) {
      key[0] = k0, key[1] = k1;
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
  }
};

// The bits of CHAINS * WordLanes::count groups from `group` on; the group number does not pass a multiple of 2^32 on the way.
// Rounds are chains of products: several side by side hide how long one takes.
template <int CHAINS>
inline void random_lanes(const RandomStream& stream, const Keys& keys, uint64_t group, uint16_t* out) {
  const WordLanes m0 = WordLanes::of(0xD2511F53u), m1 = WordLanes::of(0xCD9E8D57u);
  WordLanes c0[CHAINS], c1[CHAINS], c2[CHAINS], c3[CHAINS];
  LR_UNROLL_CHAINS
  for (int i = 0; i < CHAINS; ++i) {
    c0[i] = WordLanes::of(uint32_t(group) + uint32_t(i * WordLanes::count)) + WordLanes::index();
    c1[i] = WordLanes::of(uint32_t(group >> 32));
    c2[i] = WordLanes::of(stream.step);
    c3[i] = WordLanes::of(stream.parameter);
  }
  for (const auto& key : keys.at) {
    const WordLanes k0 = WordLanes::of(key[0]), k1 = WordLanes::of(key[1]);
    LR_UNROLL_CHAINS
    for (int i = 0; i < CHAINS; ++i) {
      const WordLanes a = m0 * c0[i], b = m1 * c2[i];
      c0[i] = WordLanes::exclusive_or(b.high(), c1[i], k0);
      c1[i] = b;
      c2[i] = WordLanes::exclusive_or(a.high(), c3[i], k1);
      c3[i] = a;
    }
  }
  LR_UNROLL_CHAINS
  for (int i = 0; i < CHAINS; ++i) c0[i].join(c1[i]).store_pairs(c2[i].join(c3[i]), out + 8 * i * WordLanes::count);
}
#endif

// Room for the bits of n elements in whole batches, wherever the first one lies in its group of 8.
constexpr int kRandomRoom = kLargestGroup + 8 + 64;

// As random_bits: the bits of elements first ... first + n - 1 from bits[first % 8] on; for n = kLargestGroup it needs kRandomRoom.
inline void random_row(const RandomStream& stream, uint64_t first, int n, uint16_t* bits) {
#ifdef __AVX2__
  const uint64_t group = first / 8;
  const int groups = (int(first % 8) + n + 7) / 8;
  if (uint32_t(group) < 0xffffffffu - uint32_t(groups + WordLanes::count)) {
    const Keys keys(stream.seed);
    int i = 0;
    for (; i + WordLanes::chains * WordLanes::count <= groups; i += WordLanes::chains * WordLanes::count)
      random_lanes<WordLanes::chains>(stream, keys, group + uint64_t(i), bits + 8 * i);
    for (; i < groups; i += WordLanes::count) random_lanes<1>(stream, keys, group + uint64_t(i), bits + 8 * i);
    return;
  }
#endif
  random_bits(OneThread{nullptr}, stream, first, n, bits);
}

// What an algorithm of one thread rounds with: run() draws the bits of at most `most` weights at once.
class Buffered {
 public:
  Buffered(const Rounding& rounding, int64_t most) : rounding_(rounding), bits_(size_t(most) + kRandomRoom - kLargestGroup) {}

  WithBits run(int64_t i, int64_t n) const {
    const uint64_t first = rounding_.first + uint64_t(i);
    random_row(rounding_.stream, first, int(n), bits_.data());
    return {bits_.data() + first % 8};
  }

 private:
  Rounding rounding_;
  mutable std::vector<uint16_t> bits_;
};

// f(what weights of type W are rounded with): at most `most` are in one run.
template <class W, class F>
auto with_rounding(const Rounding& rounding, int64_t most, const F& f) {
  if constexpr (!std::is_same_v<W, float>)
    if (rounding.stochastic) return f(Buffered(rounding, most));
  return f(ToNearest{});
}

LR_END
