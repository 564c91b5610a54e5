// NF4 weights, a warp a group: eight elements a thread at a time, which are four bytes of codes.
#include <type_traits>

#include "block.cuh"
#include "nf4.h"

LR_BEGIN
namespace {

constexpr int kWarp = 32, kWarps = 8, kVector = 8;

// A group of a matrix: its index, its first element row by row, its first byte, and its length.
struct Group {
  int64_t index, element, byte;
  int n;
};

__device__ inline Group group_of_warp(const Nf4Matrix& w) {
  const int64_t index = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t row = index / w.groups(), column = index % w.groups() * w.group_size;
  return {index, row * w.columns + column, row * w.width() + column / 2, w.length(column)};
}

template <int V, class W>
__global__ void __launch_bounds__(kWarp* kWarps) quantize_nf4(const W* dense, Nf4Matrix w, int64_t groups) {
  __shared__ float lanes[kWarps][kWarp];
  const Group g = group_of_warp(w);
  if (g.index >= groups) return;
  const GpuBlock<kWarp> block{int(threadIdx.x % kWarp), lanes[threadIdx.x / kWarp]};
  quantize_nf4_group<V>(block, dense + g.element, g.n, w.packed + g.byte, w.absmax + g.index);
}

template <int V, class W>
__global__ void __launch_bounds__(kWarp* kWarps) dequantize_nf4(Nf4Matrix w, W* dense, int64_t groups) {
  const Group g = group_of_warp(w);
  if (g.index >= groups) return;
  const GpuBlock<kWarp> block{int(threadIdx.x % kWarp), nullptr};
  dequantize_nf4_group<V>(block, w.packed + g.byte, w.absmax[g.index], g.n, dense + g.element);
}

// Whether eight elements of the dense matrix, and their four bytes, can be moved as one.
bool aligned(const void* dense, const Nf4Matrix& w) {
  return uintptr_t(dense) % 16 == 0 && uintptr_t(w.packed) % 4 == 0 && w.columns % kVector == 0;
}

// Calls f(blocks, groups, dense as its own type, integral_constant of the vector's length).
template <class F>
cudaError_t launch(DType dtype, const void* dense, const Nf4Matrix& w, int64_t rows, const F& f) {
  const int64_t groups = rows * w.groups();
  if (groups == 0) return cudaSuccess;
  const unsigned blocks = unsigned((groups + kWarps - 1) / kWarps);
  return dispatch(dtype, [&](auto type) {
    auto* typed = static_cast<typename decltype(type)::type*>(const_cast<void*>(dense));
    if (aligned(dense, w)) {
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

cudaError_t launch_quantize_nf4(DType dtype, const void* dense, const Nf4Matrix& w, int64_t rows, cudaStream_t stream) {
  return launch(dtype, dense, w, rows, [&](unsigned blocks, int64_t groups, auto* x, auto v) {
    quantize_nf4<decltype(v)::value><<<blocks, kWarp * kWarps, 0, stream>>>(x, w, groups);
  });
}

cudaError_t launch_dequantize_nf4(DType dtype, const Nf4Matrix& w, void* dense, int64_t rows, cudaStream_t stream) {
  return launch(dtype, dense, w, rows, [&](unsigned blocks, int64_t groups, auto* x, auto v) {
    dequantize_nf4<decltype(v)::value><<<blocks, kWarp * kWarps, 0, stream>>>(w, x, groups);
  });
}

}  // namespace lowrank
