// Selecting rows: a thread a row computes keys, then one block finds the r smallest. Reads 8 bytes a row and key bit from L2.
#include "../core/selection.h"
#include "block.cuh"
#include "sparse.h"

LR_BEGIN
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) row_keys(RowSelection s, RandomStream stream) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row < s.d) s.keys[row] = row_key(s.method, stream, s.norms, row);
}

__global__ void __launch_bounds__(kThreads) select_keys(RowSelection s) {
  __shared__ float lanes[kLanes];
  select_by_keys(GpuBlock<kThreads>{int(threadIdx.x), lanes}, s);
}

__global__ void __launch_bounds__(kThreads) select_draws(RowSelection s, RandomStream stream) {
  __shared__ float lanes[kLanes];
  select_by_draws(GpuBlock<kThreads>{int(threadIdx.x), lanes}, s, stream);
}

}  // namespace
LR_END

namespace lowrank {

cudaError_t launch_select_rows(const RowSelection& s, const RandomStream& stream, cudaStream_t cuda_stream) {
  if (s.method == Method::sample_replace) {
    select_draws<<<1, kThreads, 0, cuda_stream>>>(s, stream);
  } else {
    row_keys<<<unsigned((s.d + kThreads - 1) / kThreads), kThreads, 0, cuda_stream>>>(s, stream);
    select_keys<<<1, kThreads, 0, cuda_stream>>>(s);
  }
  return cudaGetLastError();
}

}  // namespace lowrank
