// Vectors of int32 that sum products of bytes, exactly, on each instruction set.
#pragma once

#include "../core/int8_gemm.h"

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

// The next loop has a few iterations and indexes registers.
#define LR_UNROLL_ALL LR_PRAGMA(GCC unroll 8)

LR_BEGIN

#ifdef __AVX512BW__

struct Lanes {
  static constexpr int count = 16, tile_vectors = 4;
  __m512i at;

  static Lanes all(int32_t x) { return {_mm512_set1_epi32(x)}; }
  static Lanes load(const void* p) { return {_mm512_loadu_si512(p)}; }
  static Lanes all_words(const uint8_t* p) {
    int32_t word;
    memcpy(&word, p, 4);
    return all(word);
  }
  // Each lane += the four products of its bytes, unsigned ones of `u` and signed ones of `s`.
  void add_products(Lanes u, Lanes s) {
#ifdef __AVX512VNNI__
    at = _mm512_dpbusd_epi32(at, u.at, s.at);
#else
    const __m512i low = _mm512_set1_epi32(0x00ff00ff);
    const __m512i even = _mm512_madd_epi16(_mm512_and_si512(u.at, low), _mm512_srai_epi16(_mm512_slli_epi16(s.at, 8), 8));
    const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(u.at, 8), _mm512_srai_epi16(s.at, 8));
    at = _mm512_add_epi32(at, _mm512_add_epi32(even, odd));
#endif
    asm("" : "+v"(at));  // GCC 12 moves a tile's sums from register to register otherwise
  }
  // gemm_add for each lane, to a sum of 0 if FIRST.
  template <bool FIRST>
  void add_scaled(float* sums, float scale_a, const float* scale_b) const {
    const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(scale_a), _mm512_loadu_ps(scale_b));
    const __m512 product = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(at));
    _mm512_storeu_ps(sums, _mm512_add_ps(FIRST ? _mm512_setzero_ps() : _mm512_loadu_ps(sums), product));
  }
};

#elif defined(__AVX2__)

struct Lanes {
  static constexpr int count = 8, tile_vectors = 2;
  __m256i at;

  static Lanes all(int32_t x) { return {_mm256_set1_epi32(x)}; }
  static Lanes load(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
  static Lanes all_words(const uint8_t* p) {
    int32_t word;
    memcpy(&word, p, 4);
    return all(word);
  }
  void add_products(Lanes u, Lanes s) {
    const __m256i low = _mm256_set1_epi32(0x00ff00ff);
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(u.at, low), _mm256_srai_epi16(_mm256_slli_epi16(s.at, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u.at, 8), _mm256_srai_epi16(s.at, 8));
    at = _mm256_add_epi32(at, _mm256_add_epi32(even, odd));
    asm("" : "+x"(at));
  }
  template <bool FIRST>
  void add_scaled(float* sums, float scale_a, const float* scale_b) const {
    const __m256 scale = _mm256_mul_ps(_mm256_set1_ps(scale_a), _mm256_loadu_ps(scale_b));
    const __m256 product = _mm256_mul_ps(scale, _mm256_cvtepi32_ps(at));
    _mm256_storeu_ps(sums, _mm256_add_ps(FIRST ? _mm256_setzero_ps() : _mm256_loadu_ps(sums), product));
  }
};

#else

struct Lanes {
  static constexpr int count = 4, tile_vectors = 4;
  typedef int32_t Words __attribute__((vector_size(16)));
  Words at;

  static Lanes all(int32_t x) { return {Words{x, x, x, x}}; }
  static Lanes load(const void* p) {
    Lanes lanes;
    memcpy(&lanes.at, p, sizeof lanes.at);
    return lanes;
  }
  static Lanes all_words(const uint8_t* p) {
    int32_t word;
    memcpy(&word, p, 4);
    return all(word);
  }
  void add_products(Lanes u, Lanes s) {
    at += (u.at & 0xff) * (s.at << 24 >> 24);
    at += (u.at >> 8 & 0xff) * (s.at << 16 >> 24);
    at += (u.at >> 16 & 0xff) * (s.at << 8 >> 24);
    at += (u.at >> 24 & 0xff) * (s.at >> 24);
  }
  template <bool FIRST>
  void add_scaled(float* sums, float scale_a, const float* scale_b) const {
    for (int i = 0; i < count; ++i) sums[i] = gemm_add(FIRST ? 0.0f : sums[i], scale_a, scale_b[i], at[i]);
  }
};

#endif

LR_END
