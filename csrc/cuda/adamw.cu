// AdamW on a list of tensors: 3 reads and 3 writes an element, one launch for each pair of dtypes and 60 tensors.
#include "../core/adamw.h"
#include "block.cuh"
#include "launch.h"
#include "number.cuh"

LR_BEGIN
namespace {

constexpr int kThreads = 256, kVector = 8, kChunk = kThreads * kVector * 8;

// Where each tensor's chunks begin in the grid.
template <class List>
struct Chunks {
  int first[List::kMost + 1];
};

// How the weights of an item are rounded from the `begin`-th on.
__device__ ToNearest rounding_of(const AdamWList::Item&, uint64_t, int64_t) { return {}; }

__device__ Drawing rounding_of(const DrawnAdamWList::Item& item, uint64_t seed, int64_t begin) {
  return {{seed, counter_step(*item.step), item.parameter}, item.offset + uint64_t(begin)};
}

__global__ void advance(const __grid_constant__ StepList list, const float* found_inf) {
  if (found_inf != nullptr && *found_inf != 0.0f) return;
  if (threadIdx.x < list.count) *list.steps[threadIdx.x] += 1.0f;
}

template <class W, class G, class List>
__global__ void __launch_bounds__(kThreads) adamw(const __grid_constant__ List list, const __grid_constant__ Chunks<List> chunks,
                                                  const __grid_constant__ AdamWScalars s, uint64_t seed) {
  if (s.found_inf != nullptr && *s.found_inf != 0.0f) return;
  __shared__ float lanes[kLanes];
  __shared__ AdamStep step;
  int index = 0;
  while (chunks.first[index + 1] <= blockIdx.x) ++index;
  const typename List::Item& item = list.items[index];
  const int64_t begin = int64_t(blockIdx.x - chunks.first[index]) * kChunk;
  if (threadIdx.x == 0) step = adam_step(s.beta1, s.beta2, s.eps, s.weight_decay, 1.0, read(s.lr), *item.step);
  __syncthreads();

  const GpuBlock<kThreads> block{int(threadIdx.x), lanes};
  W* w = static_cast<W*>(item.w) + begin;
  const G* g = static_cast<const G*>(item.g) + begin;
  float *m = item.m + begin, *v = item.v + begin;
  const int n = int(item.numel - begin < kChunk ? item.numel - begin : kChunk);
  const float grad_scale = s.grad_scale == nullptr ? 1.0f : *s.grad_scale;
  const AdamStep mine = step;
  const bool aligned = ((uintptr_t(w) | uintptr_t(g) | uintptr_t(m) | uintptr_t(v)) & 15) == 0;
  const auto rounding = rounding_of(item, seed, begin);
  const int left_out = aligned ? adamw_chunk<kVector>(block, w, g, m, v, n, grad_scale, mine, rounding)
                               : adamw_chunk<1>(block, w, g, m, v, n, grad_scale, mine, rounding);
  if (s.skipped == nullptr) return;
  const float total = sum_threads(block, float(left_out));
  if (block.tid == 0 && total > 0) atomicAdd(reinterpret_cast<unsigned long long*>(s.skipped), (unsigned long long)total);
}

}  // namespace
LR_END

namespace lowrank {

cudaError_t launch_advance(const StepList& list, const float* found_inf, cudaStream_t stream) {
  advance<<<1, 64, 0, stream>>>(list, found_inf);
  return cudaGetLastError();
}

namespace {

template <class List>
cudaError_t launch(DType w_dtype, DType g_dtype, const List& list, const AdamWScalars& scalars, uint64_t seed,
                   cudaStream_t stream) {
  Chunks<List> chunks = {};
  for (int i = 0; i < list.count; ++i) chunks.first[i + 1] = chunks.first[i] + int((list.items[i].numel + kChunk - 1) / kChunk);
  const int blocks = chunks.first[list.count];
  if (blocks == 0) return cudaSuccess;
  return dispatch(w_dtype, [&](auto w) {
    return dispatch(g_dtype, [&](auto g) {
      adamw<typename decltype(w)::type, typename decltype(g)::type, List>
          <<<blocks, kThreads, 0, stream>>>(list, chunks, scalars, seed);
      return cudaGetLastError();
    });
  });
}

}  // namespace

cudaError_t launch_adamw(DType w, DType g, const AdamWList& list, const AdamWScalars& scalars, cudaStream_t stream) {
  return launch(w, g, list, scalars, 0, stream);
}

cudaError_t launch_adamw(DType w, DType g, const DrawnAdamWList& list, const AdamWScalars& scalars, uint64_t seed,
                         cudaStream_t stream) {
  return launch(w, g, list, scalars, seed, stream);
}

}  // namespace lowrank
