// INT8 weights. An update reads W's codes, scales and the update once from memory, its second pass from the
// cache, and writes the codes once: 2 bytes an element and the update's own.
#include "coded.cuh"
#include "int8.h"
#include "number.cuh"

LR_BEGIN
namespace {

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
  const auto g = group_of_warp(w);
  if (g.index >= groups) return;
  const int warp = threadIdx.x / kWarp;
  const GpuBlock<kWarp> block{int(threadIdx.x % kWarp), lanes[warp]};
  const Int8Update u{float(read(s.alpha)), float(read(s.decay))};
  const RandomStream stream{s.seed, counter_step(read(s.step)), s.parameter};
  const Draw draw{stream, s.offset + uint64_t(g.element), g.n, bits[warp]};
  update_group<V>(block, w.codes + g.code, w.scale + g.index, dense + g.element, g.n, u, draw);
}

}  // namespace
LR_END

namespace lowrank {

template cudaError_t launch_quantize(DType, const void*, const Int8Matrix&, int64_t, cudaStream_t);
template cudaError_t launch_dequantize(DType, const Int8Matrix&, void*, int64_t, cudaStream_t);

cudaError_t launch_update_int8(DType dtype, const Int8Matrix& w, const void* dense, const Int8Scalars& scalars, int64_t rows,
                               cudaStream_t stream) {
  return launch(dtype, dense, w, rows, scalars.offset, [&](unsigned blocks, int64_t groups, auto* x, auto v) {
    update<decltype(v)::value><<<blocks, kWarp * kWarps, 0, stream>>>(w, x, scalars, groups);
  });
}

}  // namespace lowrank
