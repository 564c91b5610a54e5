// The Grass step: reads and writes the selected rows of W and both moments, reads those of G, twice from L2 at most. Weight
// decay adds one read and one write of the rest of W.
#include "../core/rows.h"
#include "block.cuh"
#include "number.cuh"
#include "sparse.h"

LR_BEGIN
namespace {

constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp, kStrip = 32, kVector = 4, kWide = 8;
constexpr int kChunk = kThreads * kWide;

__device__ bool is_no_op(const GrassArguments& a) { return a.found_inf != nullptr && *a.found_inf != 0.0f; }

// Thread 0 works the step's numbers out for its block.
__device__ AdamStep block_step(const GrassArguments& a) {
  __shared__ AdamStep step;
  if (threadIdx.x == 0) step = adam_step(a.beta1, a.beta2, a.eps, a.weight_decay, a.scale, read(a.lr), read(a.step));
  __syncthreads();
  return step;
}

template <class Rounded>
__device__ Rounded rounding_of(const GrassArguments& a) {
  if constexpr (std::is_same_v<Rounded, ToNearest>) {
    return {};
  } else {
    return {{a.rounding.stream.seed, counter_step(read(a.step)), a.rounding.stream.parameter}, a.rounding.first};
  }
}

template <class W, class G, class Rounded>
__device__ Grass<W, G, Rounded> grass_of(const GrassArguments& a) {
  return {static_cast<W*>(a.w),
          static_cast<const G*>(a.g),
          a.m,
          a.v,
          a.columns,
          a.selected,
          a.grad_scale == nullptr ? 1.0f : *a.grad_scale,
          block_step(a),
          rounding_of<Rounded>(a)};
}

__device__ void count_skipped(const GrassArguments& a, int64_t weights) {
  if (a.skipped != nullptr && weights > 0) atomicAdd(reinterpret_cast<unsigned long long*>(a.skipped), (unsigned long long)weights);
}

// A block for 32 columns.
template <int V, class W, class G, class Rounded>
__global__ void __launch_bounds__(kThreads, 2) grass_left(const __grid_constant__ GrassArguments a) {
  if (is_no_op(a)) return;
  __shared__ float lanes[kLanes];
  const GpuBlock<kThreads> block{int(threadIdx.x), lanes};
  const int64_t first = int64_t(blockIdx.x) * kStrip;
  const int columns = int(a.columns - first < kStrip ? a.columns - first : kStrip);
  const Grass<W, G, Rounded> grass = grass_of<W, G, Rounded>(a);
  const int skipped = grass_columns<kStrip, V>(block, grass, a.ok, first, columns);
  count_skipped(a, skipped * a.rows);
}

// A warp for a row.
template <int V, class W, class G, class Rounded>
__global__ void __launch_bounds__(kThreads, 2) grass_right(const __grid_constant__ GrassArguments a) {
  if (is_no_op(a)) return;
  __shared__ float lanes[kWarps][kLanes];
  const Grass<W, G, Rounded> grass = grass_of<W, G, Rounded>(a);
  const int warp = threadIdx.x / kWarp;
  const int64_t row = int64_t(blockIdx.x) * kWarps + warp;
  if (row >= a.rows) return;
  const GpuBlock<kWarp> block{int(threadIdx.x % kWarp), lanes[warp]};
  if (!grass_row<V>(block, grass, row) && block.tid == 0) count_skipped(a, a.columns);
}

// A block for a chunk of a row that is not selected.
template <int V, class W, class Rounded>
__global__ void __launch_bounds__(kThreads) decay_others(const __grid_constant__ GrassArguments a, int64_t chunks) {
  const int64_t row = blockIdx.x / chunks, begin = blockIdx.x % chunks * kChunk;
  if (is_no_op(a) || a.selected.owner[row] != SelectedRows::kNobody) return;
  const int64_t end = begin + kChunk < a.columns ? begin + kChunk : a.columns;
  const GpuBlock<kThreads> block{int(threadIdx.x), nullptr};
  const float decay = float(1 - read(a.lr) * a.weight_decay);
  const int64_t at = row * a.columns + begin;
  decay_row<V>(block, static_cast<W*>(a.w) + at, a.ok + begin, end - begin, decay, rounding_of<Rounded>(a).run(at, end - begin));
}

}  // namespace
LR_END

namespace lowrank {
namespace {

template <class W, class Rounded>
cudaError_t launch(DType g_dtype, const GrassArguments& a, bool left, cudaStream_t stream) {
  const bool pointers = (uintptr_t(a.w) | uintptr_t(a.g) | uintptr_t(a.m) | uintptr_t(a.v)) % 16 == 0;
  const cudaError_t error = dispatch(g_dtype, [&](auto g_type) {
    using G = typename decltype(g_type)::type;
    if (left) {
      const unsigned blocks = unsigned((a.columns + kStrip - 1) / kStrip);
      pointers&& a.columns % kStrip == 0 ? grass_left<kVector, W, G, Rounded><<<blocks, kThreads, 0, stream>>>(a)
                                         : grass_left<1, W, G, Rounded><<<blocks, kThreads, 0, stream>>>(a);
    } else {
      const unsigned blocks = unsigned((a.rows + kWarps - 1) / kWarps);
      pointers&& a.columns % kWide == 0 ? grass_right<kWide, W, G, Rounded><<<blocks, kThreads, 0, stream>>>(a)
                                        : grass_right<1, W, G, Rounded><<<blocks, kThreads, 0, stream>>>(a);
    }
    return cudaGetLastError();
  });
  if (error != cudaSuccess || !left || a.ok == nullptr) return error;
  const int64_t chunks = (a.columns + kChunk - 1) / kChunk;
  const unsigned blocks = unsigned(a.rows * chunks);
  pointers&& a.columns % kWide == 0 ? decay_others<kWide, W, Rounded><<<blocks, kThreads, 0, stream>>>(a, chunks)
                                    : decay_others<1, W, Rounded><<<blocks, kThreads, 0, stream>>>(a, chunks);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_grass(DType w_dtype, DType g_dtype, const GrassArguments& a, bool left, cudaStream_t stream) {
  if (a.rows == 0 || a.columns == 0) return cudaSuccess;
  return dispatch(w_dtype, [&](auto w_type) {
    using W = typename decltype(w_type)::type;
    if constexpr (!std::is_same_v<W, float>)
      if (a.rounding.stochastic) return launch<W, Drawing>(g_dtype, a, left, stream);
    return launch<W, ToNearest>(g_dtype, a, left, stream);
  });
}

}  // namespace lowrank
