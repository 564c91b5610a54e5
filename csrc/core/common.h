// What every torch-free header starts from: LR_HD, hints for loops, and one namespace for each instruction set.
#pragma once

#include <cmath>
#include <cstdint>

#define LR_PRAGMA(x) _Pragma(#x)
#ifdef __CUDACC__
#define LR_HD __host__ __device__ __forceinline__
#define LR_SIMD
#define LR_SIMD_SUM(x)
#define LR_SIMD_MAX(...)
// Loads of n iterations of the next loop are under way at once: a GPU thread hides its latency that way.
#define LR_UNROLL(n) LR_PRAGMA(unroll n)
#else
#define LR_HD inline
// The iterations of the next loop are independent even where its pointers are equal.
#define LR_SIMD LR_PRAGMA(omp simd)
#define LR_SIMD_SUM(x) LR_PRAGMA(omp simd reduction(+ : x))
#define LR_SIMD_MAX(...) LR_PRAGMA(omp simd reduction(max : __VA_ARGS__))
#define LR_UNROLL(n)
#endif

// csrc/cpu is compiled once for each instruction set; a namespace of its own keeps the linker from merging their code.
#ifndef LR_ISA
#define LR_ISA portable
#endif

#define LR_BEGIN      \
  namespace lowrank { \
  inline namespace LR_ISA {
#define LR_END \
  }            \
  }

LR_BEGIN

// V elements that are loaded and stored as one.
template <class T, int V>
struct alignas(sizeof(T) * V <= 16 ? sizeof(T) * V : 16) Pack {
  T at[V];
};

// One element by itself, because a copied struct keeps a loop from vectors.
template <int V, class T>
LR_HD Pack<T, V> load(const T* p) {
  if constexpr (V == 1) return {{*p}};
  return *reinterpret_cast<const Pack<T, V>*>(p);
}

template <int V, class T>
LR_HD void store(T* p, const Pack<T, V>& x) {
  if constexpr (V == 1) {
    *p = x.at[0];
  } else {
    *reinterpret_cast<Pack<T, V>*>(p) = x;
  }
}

// f(e, element) of V elements from p, loaded as one.
template <int V, class T, class F>
LR_HD void load_each(const T* p, const F& f) {
  if constexpr (V == 1) {
    f(0, *p);
  } else {
    const auto pack = load<V>(p);
    for (int e = 0; e < V; ++e) f(e, pack.at[e]);
  }
}

// p[e] = f(e), stored as one.
template <int V, class T, class F>
LR_HD void store_each(T* p, const F& f) {
  if constexpr (V == 1) {
    *p = f(0);
  } else {
    Pack<T, V> pack;
    for (int e = 0; e < V; ++e) pack.at[e] = f(e);
    store(p, pack);
  }
}

LR_END
