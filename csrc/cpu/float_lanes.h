// Vectors of fp32 that sum products with one rounding, on each instruction set.
#pragma once

#include "lanes.h"

LR_BEGIN

#ifdef __AVX512F__

struct FloatLanes {
  static constexpr int count = 16;
  static constexpr bool fast = true;
  __m512 at;

  static FloatLanes all(float x) { return {_mm512_set1_ps(x)}; }
  static FloatLanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
  // The first n lanes, and zeros.
  static FloatLanes load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  void store(float* p) const { _mm512_storeu_ps(p, at); }
  void store(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), at); }
  void add(FloatLanes x) { at = _mm512_add_ps(at, x.at); }
  // Written out, because GCC 12 moves a tile's sums from register to register otherwise.
  void add_product(FloatLanes x, FloatLanes y) { asm("vfmadd231ps %1, %2, %0" : "+v"(at) : "v"(x.at), "v"(y.at)); }

 private:
  static __mmask16 first(int n) { return __mmask16((1u << n) - 1); }
};

#else

struct FloatLanes {
  static constexpr int count = 16;
  static constexpr bool fast = false;
  float at[count];

  static FloatLanes all(float x) {
    FloatLanes lanes;
    for (float& lane : lanes.at) lane = x;
    return lanes;
  }
  static FloatLanes load(const float* p, int n = count) {
    FloatLanes lanes = all(0.0f);
    for (int i = 0; i < n; ++i) lanes.at[i] = p[i];
    return lanes;
  }
  void store(float* p, int n = count) const {
    for (int i = 0; i < n; ++i) p[i] = at[i];
  }
  void add(FloatLanes x) {
    for (int i = 0; i < count; ++i) at[i] += x.at[i];
  }
  void add_product(FloatLanes x, FloatLanes y) {
    for (int i = 0; i < count; ++i) at[i] = std::fma(x.at[i], y.at[i], at[i]);
  }
};

#endif

LR_END
