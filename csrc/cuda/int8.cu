// INT8 weights, a warp a group. An update reads W's codes, scales and the update once from memory, its second pass from the
// cache, and writes the codes once: 2 bytes an element and the update's own.
#include <type_traits>

#include "block.cuh"
#include "int8.h"
#include "number.cuh"

LR_BEGIN
namespace {

constexpr int kWarp = 32, kWarps = 8, kVector = 8;

// A group of a matrix: its first element, row by row, and its length.
struct Group {
  int64_t index, element;
  int n;
};

__device__ inline Group group_of_warp(const Int8Matrix& w) {
  const int64_t index = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t row = index / w.groups(), column = index % w.groups() * w.group_size;
  return {index, row * w.columns + column, w.length(column)};
}

template <int V, class W>
__global__ void __launch_bounds__(kWarp* kWarps) quantize(const W* dense, Int8Matrix w, int64_t groups) {
  __shared__ float lanes[kWarps][kWarp];
  const Group g = group_of_warp(w);
  if (g.index >= groups) return;
  const GpuBlock<kWarp> block{int(threadIdx.x % kWarp), lanes[threadIdx.x / kWarp]};
  quantize_group<V>(block, dense + g.element, g.n, w.codes + g.element, w.scale + g.index);
}

template <int V, class W>
__global__ void __launch_bounds__(kWarp* kWarps) dequantize(Int8Matrix w, W* dense, int64_t groups) {
  const Group g = group_of_warp(w);
  if (g.index >= groups) return;
  const GpuBlock<kWarp> block{int(threadIdx.x % kWarp), nullptr};
  dequantize_group<V>(block, w.codes + g.element, w.scale[g.index], g.n, dense + g.element);
}

// The random bits of a group, in shared memory.
struct Draw {
  RandomStream stream;
  uint64_t first;
  int n;
  uint16_t* bits;
  template <class Block>
  __device__ const uint16_t* operator()(const Block& block) const {
    random_bits(block, stream, first, n, bits);
    return bits + first % 8;
  }
};

template <int V, class G>
__global__ void __launch_bounds__(kWarp* kWarps)
    update(Int8Matrix w, const G* dense, const __grid_constant__ Int8Scalars s, int64_t groups) {
  __shared__ float lanes[kWarps][kWarp];
  __shared__ alignas(16) uint16_t bits[kWarps][kLargestGroup + 16];
  const Group g = group_of_warp(w);
  if (g.index >= groups) return;
  const int warp = threadIdx.x / kWarp;
  const GpuBlock<kWarp> block{int(threadIdx.x % kWarp), lanes[warp]};
  const Int8Update u{float(read(s.alpha)), float(read(s.decay))};
  const RandomStream stream{s.seed, counter_step(read(s.step)), s.parameter};
  const Draw draw{stream, s.offset + uint64_t(g.element), g.n, bits[warp]};
  update_group<V>(block, w.codes + g.element, w.scale + g.index, dense + g.element, g.n, u, draw);
}

// Whether eight elements of the dense matrix, of the codes and of the random bits can be moved as one.
bool aligned(const void* dense, const Int8Matrix& w, uint64_t offset) {
  return uintptr_t(dense) % 16 == 0 && uintptr_t(w.codes) % kVector == 0 && w.columns % kVector == 0 && offset % kVector == 0;
}

// Calls f(blocks, groups, dense as its own type, integral_constant of the vector's length).
template <class F>
cudaError_t launch(DType dtype, const void* dense, const Int8Matrix& w, int64_t rows, uint64_t offset, const F& f) {
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

cudaError_t launch_quantize_int8(DType dtype, const void* dense, const Int8Matrix& w, int64_t rows, cudaStream_t stream) {
  return launch(dtype, dense, w, rows, 0, [&](unsigned blocks, int64_t groups, auto* x, auto v) {
    quantize<decltype(v)::value><<<blocks, kWarp * kWarps, 0, stream>>>(x, w, groups);
  });
}

cudaError_t launch_dequantize_int8(DType dtype, const Int8Matrix& w, void* dense, int64_t rows, cudaStream_t stream) {
  return launch(dtype, dense, w, rows, 0, [&](unsigned blocks, int64_t groups, auto* x, auto v) {
    dequantize<decltype(v)::value><<<blocks, kWarp * kWarps, 0, stream>>>(w, x, groups);
  });
}

cudaError_t launch_update_int8(DType dtype, const Int8Matrix& w, const void* dense, const Int8Scalars& scalars, int64_t rows,
                               cudaStream_t stream) {
  return launch(dtype, dense, w, rows, scalars.offset, [&](unsigned blocks, int64_t groups, auto* x, auto v) {
    update<decltype(v)::value><<<blocks, kWarp * kWarps, 0, stream>>>(w, x, scalars, groups);
  });
}

}  // namespace lowrank
