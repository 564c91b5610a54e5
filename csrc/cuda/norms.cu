// Norms of rows, a warp a row; and of columns, a warp for 32 neighbours, or a thread block where rows are not aligned. One read
// of the matrix.
#include "../core/norms.h"
#include "block.cuh"
#include "launch.h"

LR_BEGIN
namespace {

constexpr int kWarp = 32, kWarps = 8, kVector = 8;

template <int V, class G>
__global__ void __launch_bounds__(kWarp* kWarps, 4) row_norms(const G* g, float* norms, int64_t rows, int64_t columns) {
  __shared__ float lanes[kWarps][kLanes];
  const int warp = threadIdx.x / kWarp;
  const int64_t row = int64_t(blockIdx.x) * kWarps + warp;
  if (row >= rows) return;
  const GpuBlock<kWarp> block{int(threadIdx.x % kWarp), lanes[warp]};
  const float norm = row_norm<V>(block, g + row * columns, columns);
  if (block.tid == 0) norms[row] = norm;
}

template <class G>
__global__ void __launch_bounds__(kLanes) column_norms_kernel(const G* g, float* norms, int64_t rows, int64_t columns) {
  __shared__ float lanes[kLanes];
  const GpuBlock<kLanes> block{int(threadIdx.x), lanes};
  const int64_t first = int64_t(blockIdx.x) * kColumns;
  column_norms<1>(block, g + first, norms + first, rows, int(columns - first < kColumns ? columns - first : kColumns), columns);
}

template <class G>
__global__ void __launch_bounds__(kWarp) column_tile_norms_kernel(const G* g, float* norms, int64_t rows, int64_t columns) {
  __shared__ float lanes[kLanes];
  const GpuBlock<kWarp> block{int(threadIdx.x), lanes};
  const int64_t first = int64_t(blockIdx.x) * kColumns;
  column_tile_norms<16 / sizeof(G)>(block, g + first, norms + first, rows, columns);
}

}  // namespace
LR_END

namespace lowrank {

cudaError_t launch_row_norms(DType dtype, const void* data, float* norms, int64_t rows, int64_t columns, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto type) {
    using G = typename decltype(type)::type;
    const auto* g = static_cast<const G*>(data);
    const unsigned blocks = unsigned((rows + kWarps - 1) / kWarps);
    const bool aligned = uintptr_t(g) % 16 == 0 && columns * sizeof(G) % 16 == 0;
    if (aligned) {
      row_norms<kVector><<<blocks, kWarp * kWarps, 0, stream>>>(g, norms, rows, columns);
    } else {
      row_norms<1><<<blocks, kWarp * kWarps, 0, stream>>>(g, norms, rows, columns);
    }
    return cudaGetLastError();
  });
}

cudaError_t launch_column_norms(DType dtype, const void* data, float* norms, int64_t rows, int64_t columns, cudaStream_t stream) {
  if (columns == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto type) {
    const auto* g = static_cast<const typename decltype(type)::type*>(data);
    const unsigned blocks = unsigned((columns + kColumns - 1) / kColumns);
    if (uintptr_t(g) % 16 == 0 && columns % kColumns == 0) {
      column_tile_norms_kernel<<<blocks, kWarp, 0, stream>>>(g, norms, rows, columns);
    } else {
      column_norms_kernel<<<blocks, kLanes, 0, stream>>>(g, norms, rows, columns);
    }
    return cudaGetLastError();
  });
}

}  // namespace lowrank
