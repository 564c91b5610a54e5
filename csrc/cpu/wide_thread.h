// One thread with 512-bit vectors: the gathers of 8-bit codes by hand, bit for bit those of csrc/core. A compiler that
// vectorises them itself splits them in halves and packs the codes in many steps.
#pragma once

#include "../core/blockwise.h"
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
  const __m512i magnitude =
      SIGNED ? _mm512_add_epi32(_mm512_and_epi32(bits, _mm512_set1_epi32(0x7fffffff)), negative) : bits;
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

template <int V, bool SIGNED>
inline void encode_block(const WideThread&, const Codebook<SIGNED>& book, const float* values, uint8_t* codes, float* absmax,
                         int n) {
  const __m512i absolute = _mm512_set1_epi32(0x7fffffff);
  __m512i most = _mm512_setzero_si512();
  for (int i = 0; i < n; i += 16) {
    const __m512i bits = _mm512_castps_si512(_mm512_maskz_loadu_ps(first_lanes(n - i), values + i));
    most = _mm512_max_epu32(most, _mm512_and_epi32(bits, absolute));
  }
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

template <int V, bool SIGNED>
inline void decode_block(const WideThread&, const Codebook<SIGNED>& book, const uint8_t* codes, float absmax, float* values,
                         int n) {
  const __m512 scale = _mm512_set1_ps(absmax);
  for (int i = 0; i < n; i += 16) {
    const __mmask16 lanes = first_lanes(n - i);
    const __m512i index = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes, codes + i));
    _mm512_mask_storeu_ps(values + i, lanes, _mm512_mul_ps(_mm512_i32gather_ps(index, book.value, 4), scale));
  }
}

#endif

LR_END
