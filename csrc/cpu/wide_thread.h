// One thread with 512-bit vectors: the gathers of 8-bit codes, and Adam between them, by hand, bit for bit those of csrc/core.
// A compiler that vectorises gathers itself splits them in halves and packs the codes in many steps.
#pragma once

#include "../core/adam_8bit.h"
#include "one_thread.h"

#ifdef __AVX512F__
// GCC 12 takes the undefined operands inside its own intrinsics for mistakes.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

LR_BEGIN

struct WideThread : OneThread {
  WideThread() : OneThread{nullptr} {}
};

#ifdef __AVX512F__

// Sixteen codes: core's nearest_code.
template <bool SIGNED>
inline __m128i nearest_codes(const Codebook<SIGNED>& book, __m512 y) {
  const __m512i bits = _mm512_castps_si512(y), least = _mm512_set1_epi32(kFirstBin << 16);
  const __m512i negative = _mm512_srli_epi32(bits, 31);
  const __m512i magnitude = SIGNED ? _mm512_add_epi32(_mm512_and_epi32(bits, _mm512_set1_epi32(0x7fffffff)), negative) : bits;
  const __m512i a = _mm512_max_epi32(magnitude, least);
  const __m512i bin = _mm512_srli_epi32(_mm512_sub_epi32(a, least), 16);
  const __m512i low = _mm512_and_epi32(a, _mm512_set1_epi32(0xffff));
  const __m512i rank = _mm512_srli_epi32(_mm512_add_epi32(_mm512_i32gather_epi32(bin, book.bin, 4), low), 16);
  if constexpr (!SIGNED) return _mm512_cvtepi32_epi8(rank);
  const __m512i kept = _mm512_min_epi32(rank, _mm512_sub_epi32(_mm512_set1_epi32(128), negative));
  const __m512i sign = _mm512_sub_epi32(_mm512_setzero_si512(), negative);
  const __m512i code = _mm512_add_epi32(_mm512_xor_epi32(kept, sign), negative);
  return _mm512_cvtepi32_epi8(_mm512_add_epi32(code, _mm512_set1_epi32(127)));
}

inline __mmask16 first_lanes(int n) { return n >= 16 ? 0xffff : __mmask16((1 << n) - 1); }

// Codes and absmax of values whose largest magnitude is `most`, as bits.
template <bool SIGNED>
inline void encode_values(const Codebook<SIGNED>& book, const float* values, __m512i most, uint8_t* codes, float* absmax, int n) {
  const BlockScale scale = block_scale(bits_float(_mm512_reduce_max_epu32(most)));
  *absmax = scale.absmax;
  if (scale.inverse == 0.0f) {
    memset(codes, Codebook<SIGNED>::zero, size_t(n));
    return;
  }
  const __m512 inverse = _mm512_set1_ps(scale.inverse);
  for (int i = 0; i < n; i += 16) {
    const __mmask16 lanes = first_lanes(n - i);
    const __m512 y = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, values + i), inverse);
    _mm_mask_storeu_epi8(codes + i, lanes, nearest_codes(book, y));
  }
}

inline __m512i larger(__m512i most, __m512 x) { return _mm512_max_epu32(most, _mm512_castps_si512(_mm512_abs_ps(x))); }

template <int V, bool SIGNED>
inline void encode_block(const WideThread&, const Codebook<SIGNED>& book, const float* values, uint8_t* codes, float* absmax,
                         int n) {
  __m512i most = _mm512_setzero_si512();
  for (int i = 0; i < n; i += 16) most = larger(most, _mm512_maskz_loadu_ps(first_lanes(n - i), values + i));
  encode_values(book, values, most, codes, absmax, n);
}

// The values of `lanes`, 0 in all others.
template <bool SIGNED>
inline __m512 decode_values(const Codebook<SIGNED>& book, const uint8_t* codes, __m512 absmax, __mmask16 lanes) {
  const __m512i index = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes, codes));
  return _mm512_maskz_mul_ps(lanes, _mm512_i32gather_ps(index, book.value, 4), absmax);
}

template <int V, bool SIGNED>
inline void decode_block(const WideThread&, const Codebook<SIGNED>& book, const uint8_t* codes, float absmax, float* values,
                         int n) {
  const __m512 scale = _mm512_set1_ps(absmax);
  for (int i = 0; i < n; i += 16) {
    const __mmask16 lanes = first_lanes(n - i);
    _mm512_mask_storeu_ps(values + i, lanes, decode_values(book, codes + i, scale, lanes));
  }
}

// Division by one number, with the bits of the instruction but without it: from a quotient that is one of the two nearest
// floats, a step with its exact remainder and the rounded reciprocal gives the nearest (Markstein 1990).
class Divisor {
 public:
  explicit Divisor(float by) : by_(_mm512_set1_ps(by)) {
    const float high = 1.0f / by, low = std::fma(-by, high, 1.0f) * high;
    high_ = _mm512_set1_ps(high), low_ = _mm512_set1_ps(low);
    // |x| from 2^-96 to 2^96: no remainder is rounded, and nothing overflows.
    least_ = _mm512_set1_epi32(int32_t(float_bits(0x1p-96f)));
    span_ = _mm512_set1_epi32(by >= 0x1p-24f && by <= 1.0f ? 192 << 23 : 0);
  }
  __m512 divide(__m512 x) const {
    const __m512i above = _mm512_sub_epi32(_mm512_castps_si512(_mm512_abs_ps(x)), least_);
    if (_mm512_cmpge_epu32_mask(above, span_) != 0) [[unlikely]]
      return _mm512_div_ps(x, by_);
    const __m512 near = _mm512_fmadd_ps(x, high_, _mm512_mul_ps(x, low_));
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(near, by_, x), high_, near);
  }

 private:
  __m512 by_, high_, low_;
  __m512i least_, span_;
};

template <int V>
inline void advance_moments(const WideThread&, const Codebooks& books, const Moments8bit& moments, const float* g, float* update,
                            int n, const AdamStep& s) {
  alignas(64) float ms[kBlock], vs[kBlock];
  const __m512 beta1 = _mm512_set1_ps(s.beta1), beta2 = _mm512_set1_ps(s.beta2), eps = _mm512_set1_ps(s.eps);
  const __m512 rest1 = _mm512_set1_ps(s.one_minus_beta1), rest2 = _mm512_set1_ps(s.one_minus_beta2);
  const __m512 m_absmax = _mm512_set1_ps(*moments.m_absmax), v_absmax = _mm512_set1_ps(*moments.v_absmax);
  const Divisor correction1(s.correction1), correction2(s.correction2);
  __m512i most_m = _mm512_setzero_si512(), most_v = most_m;
  for (int i = 0; i < n; i += 16) {
    const __mmask16 lanes = first_lanes(n - i);
    const __m512 x = _mm512_maskz_loadu_ps(lanes, g + i);
    const __m512 old_m = decode_values(books.m, moments.m + i, m_absmax, lanes);
    const __m512 old_v = decode_values(books.v, moments.v + i, v_absmax, lanes);
    const __m512 m = _mm512_add_ps(_mm512_mul_ps(beta1, old_m), _mm512_mul_ps(rest1, x));
    const __m512 v = _mm512_add_ps(_mm512_mul_ps(beta2, old_v), _mm512_mul_ps(_mm512_mul_ps(rest2, x), x));
    const __m512 root = _mm512_add_ps(_mm512_sqrt_ps(correction2.divide(v)), eps);
    _mm512_mask_storeu_ps(update + i, lanes, _mm512_div_ps(correction1.divide(m), root));
    const __mmask16 ok = lanes & _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(0x1p64f), _CMP_LT_OQ);
    const __m512 new_m = _mm512_mask_mov_ps(old_m, ok, m), new_v = _mm512_mask_mov_ps(old_v, ok, v);
    most_m = larger(most_m, new_m), most_v = larger(most_v, new_v);
    _mm512_store_ps(ms + i, new_m);
    _mm512_store_ps(vs + i, new_v);
  }
  encode_values(books.m, ms, most_m, moments.m, moments.m_absmax, n);
  encode_values(books.v, vs, most_v, moments.v, moments.v_absmax, n);
}

#endif

LR_END
