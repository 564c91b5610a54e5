// Weights in codes, a warp a group: eight elements a thread at a time where all memory begins on as many.
#pragma once

#include <type_traits>

#include "block.cuh"
#include "coded.h"

LR_BEGIN
namespace {

constexpr int kWarp = 32, kWarps = 8, kVector = 8;

template <class M>
__device__ auto group_of_warp(const M& w) {
  return w.group(int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp);
}

template <int V, class W, class M>
__global__ void __launch_bounds__(kWarp* kWarps) quantize(const W* dense, M w, int64_t groups) {
  __shared__ float lanes[kWarps][kWarp];
  const auto g = group_of_warp(w);
  if (g.index >= groups) return;
  const GpuBlock<kWarp> block{int(threadIdx.x % kWarp), lanes[threadIdx.x / kWarp]};
  quantize_group<V>(block, dense + g.element, g.n, w.codes + g.code, w.scale + g.index);
}

template <int V, class W, class M>
__global__ void __launch_bounds__(kWarp* kWarps) dequantize(M w, W* dense, int64_t groups) {
  const auto g = group_of_warp(w);
  if (g.index >= groups) return;
  const GpuBlock<kWarp> block{int(threadIdx.x % kWarp), nullptr};
  dequantize_group<V>(block, w.codes + g.code, w.scale[g.index], g.n, dense + g.element);
}

// Whether eight elements of the dense matrix, of the codes and of the random bits can be moved as one.
template <class M>
bool aligned(const void* dense, const M& w, uint64_t offset) {
  return uintptr_t(dense) % 16 == 0 && uintptr_t(w.codes) % (kVector / M::together) == 0 && w.columns % kVector == 0 &&
         offset % kVector == 0;
}

// Calls f(blocks, groups, dense as its own type, integral_constant of the vector's length).
template <class M, class F>
cudaError_t launch(DType dtype, const void* dense, const M& w, int64_t rows, uint64_t offset, const F& f) {
  const int64_t groups = rows * w.groups();
  if (groups == 0) return cudaSuccess;
  const unsigned blocks = unsigned((groups + kWarps - 1) / kWarps);
  return dispatch(dtype, [&](auto type) {
    auto* typed = static_cast<typename decltype(type)::type*>(const_cast<void*>(dense));
    if (aligned(dense, w, offset)) {
      f(blocks, groups, typed, std::integral_constant<int, kVector>{});
    } else {
      f(blocks, groups, typed, std::integral_constant<int, 1>{});
    }
    return cudaGetLastError();
  });
}

}  // namespace
LR_END

namespace lowrank {

template <class M>
cudaError_t launch_quantize(DType dtype, const void* dense, const M& w, int64_t rows, cudaStream_t stream) {
  return launch(dtype, dense, w, rows, 0, [&](unsigned blocks, int64_t groups, auto* x, auto v) {
    quantize<decltype(v)::value><<<blocks, kWarp * kWarps, 0, stream>>>(x, w, groups);
  });
}

template <class M>
cudaError_t launch_dequantize(DType dtype, const M& w, void* dense, int64_t rows, cudaStream_t stream) {
  return launch(dtype, dense, w, rows, 0, [&](unsigned blocks, int64_t groups, auto* x, auto v) {
    dequantize<decltype(v)::value><<<blocks, kWarp * kWarps, 0, stream>>>(w, x, groups);
  });
}

}  // namespace lowrank
