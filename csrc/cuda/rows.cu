// Gathering and scattering selected rows and columns: one read, and one write, of what is selected.
#include "../core/rows.h"
#include "block.cuh"
#include "sparse.h"

LR_BEGIN
namespace {

constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp, kVector = 4, kChunk = kThreads * kVector * 2;

__global__ void __launch_bounds__(kThreads) claim(SelectedRows s, uint32_t* owner) {
  const int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (j < s.count && in_range(s, j)) atomicMin(owner + s.indices[j], uint32_t(j));
}

// A block for a chunk of a selected row.
template <int V, class G>
__global__ void __launch_bounds__(kThreads) gather_rows(const G* g, SelectedRows s, float* x, int64_t n, int64_t chunks) {
  const int64_t j = blockIdx.x / chunks, begin = blockIdx.x % chunks * kChunk, end = begin + kChunk < n ? begin + kChunk : n;
  const GpuBlock<kThreads> block{int(threadIdx.x), nullptr};
  float* to = x + j * n + begin;
  if (in_range(s, j)) {
    gather_row<V>(block, g + s.indices[j] * n + begin, to, end - begin, scale_of(s, j));
  } else {
    for (int64_t i = threadIdx.x; i < end - begin; i += kThreads) to[i] = 0.0f;
  }
}

template <int V, class W>
__global__ void __launch_bounds__(kThreads) add_rows(W* w, SelectedRows s, const float* x, int64_t n, int64_t chunks, float alpha) {
  const int64_t j = blockIdx.x / chunks, begin = blockIdx.x % chunks * kChunk, end = begin + kChunk < n ? begin + kChunk : n;
  if (!counted(s, j)) return;
  const GpuBlock<kThreads> block{int(threadIdx.x), nullptr};
  add_row<V>(block, w + s.indices[j] * n + begin, x + j * n + begin, end - begin, alpha * scale_of(s, j));
}

// A warp for a row of the matrix.
template <class G>
__global__ void __launch_bounds__(kThreads) gather_columns_kernel(const G* g, SelectedRows s, float* x, int64_t m, int64_t n) {
  const int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (i < m) gather_columns(GpuBlock<kWarp>{int(threadIdx.x % kWarp), nullptr}, g + i * n, x + i * s.count, s);
}

template <class W>
__global__ void __launch_bounds__(kThreads)
    add_columns_kernel(W* w, SelectedRows s, const float* x, int64_t m, int64_t n, float alpha) {
  const int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (i < m) add_columns(GpuBlock<kWarp>{int(threadIdx.x % kWarp), nullptr}, w + i * n, x + i * s.count, s, alpha);
}

// Whether rows of n elements, of the matrix and of x, all start on addresses that vectors can be loaded from.
template <class T>
bool aligned(const T* matrix, const float* x, int64_t n) {
  return (uintptr_t(matrix) | uintptr_t(x)) % 16 == 0 && n % kVector == 0;
}

}  // namespace
LR_END

namespace lowrank {

cudaError_t launch_claim(const SelectedRows& rows, uint32_t* owner, cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(owner, 0xff, rows.size * sizeof *owner, stream);
  if (error != cudaSuccess) return error;
  claim<<<unsigned((rows.count + kThreads - 1) / kThreads), kThreads, 0, stream>>>(rows, owner);
  return cudaGetLastError();
}

cudaError_t launch_gather(DType dtype, const void* data, const SelectedRows& rows, float* x, int64_t m, int64_t n, bool left,
                          cudaStream_t stream) {
  if (n == 0 || (!left && m == 0)) return cudaSuccess;
  return dispatch(dtype, [&](auto type) {
    const auto* g = static_cast<const typename decltype(type)::type*>(data);
    const int64_t chunks = (n + kChunk - 1) / kChunk;
    if (!left) {
      gather_columns_kernel<<<unsigned((m + kWarps - 1) / kWarps), kThreads, 0, stream>>>(g, rows, x, m, n);
    } else if (aligned(g, x, n)) {
      gather_rows<kVector><<<unsigned(rows.count * chunks), kThreads, 0, stream>>>(g, rows, x, n, chunks);
    } else {
      gather_rows<1><<<unsigned(rows.count * chunks), kThreads, 0, stream>>>(g, rows, x, n, chunks);
    }
    return cudaGetLastError();
  });
}

cudaError_t launch_scatter_add(DType dtype, void* data, const SelectedRows& rows, const float* x, int64_t m, int64_t n, float alpha,
                               bool left, cudaStream_t stream) {
  if (m == 0 || n == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto type) {
    auto* w = static_cast<typename decltype(type)::type*>(data);
    const int64_t chunks = (n + kChunk - 1) / kChunk;
    if (!left) {
      add_columns_kernel<<<unsigned((m + kWarps - 1) / kWarps), kThreads, 0, stream>>>(w, rows, x, m, n, alpha);
    } else if (aligned(w, x, n)) {
      add_rows<kVector><<<unsigned(rows.count * chunks), kThreads, 0, stream>>>(w, rows, x, n, chunks, alpha);
    } else {
      add_rows<1><<<unsigned(rows.count * chunks), kThreads, 0, stream>>>(w, rows, x, n, chunks, alpha);
    }
    return cudaGetLastError();
  });
}

}  // namespace lowrank
