// Blockwise 8-bit codes: a warp a block of 256. Tables of the maps are copied to shared memory, where 32 lookups of a warp
// take a few cycles.
#include "block.cuh"
#include "blockwise.h"
#include "number.cuh"

LR_BEGIN
namespace {

constexpr int kWarp = 32, kWarps = 8, kThreads = kWarp * kWarps, kVector = 8;

__device__ const Codebook<true> signed_book = make_codebook<true>();
__device__ const Codebook<false> unsigned_book = make_codebook<false>();

template <class T>
__device__ void copy(T& to, const T& from) {
  static_assert(sizeof(T) % 4 == 0);
  for (int i = threadIdx.x; i < int(sizeof(T) / 4); i += kThreads)
    reinterpret_cast<uint32_t*>(&to)[i] = reinterpret_cast<const uint32_t*>(&from)[i];
}

template <bool SIGNED>
__device__ const Codebook<SIGNED>& device_book() {
  if constexpr (SIGNED) {
    return signed_book;
  } else {
    return unsigned_book;
  }
}

// Calls f(block, i) on the blocks of 256 that this warp has of `numel` elements from block `first` on.
template <class F>
__device__ void for_blocks(int64_t first, int per_warp, int64_t numel, const F& f) {
  __shared__ float lanes[kWarps][kWarp];  // reductions of a warp take one lane a thread
  const int warp = threadIdx.x / kWarp;
  const GpuBlock<kWarp> block{int(threadIdx.x % kWarp), lanes[warp]};
  for (int k = 0; k < per_warp; ++k) {
    const int64_t i = first + k * kWarps + warp;
    if (i * kBlock < numel) f(block, i);
  }
}

__device__ int length(int64_t i, int64_t numel) { return int(numel - i * kBlock < kBlock ? numel - i * kBlock : kBlock); }

// Whether all of these begin on `bytes` bytes.
template <class... P>
LR_HD bool aligned(uintptr_t bytes, const P*... pointers) {
  return ((uintptr_t(pointers) | ...) & (bytes - 1)) == 0;
}

template <bool SIGNED, class X>
__global__ void __launch_bounds__(kThreads, 2) quantize(const X* x, uint8_t* codes, float* absmax, int64_t numel, int per_warp) {
  __shared__ Codebook<SIGNED> book;
  copy(book, device_book<SIGNED>());
  __syncthreads();
  const bool wide = aligned(16, x) && aligned(8, codes);
  for_blocks(int64_t(blockIdx.x) * per_warp * kWarps, per_warp, numel, [&](const auto& block, int64_t i) {
    const int n = length(i, numel);
    if (wide && n == kBlock) {
      quantize_block<kVector>(block, book, x + i * kBlock, codes + i * kBlock, absmax + i, n);
    } else {
      quantize_block<1>(block, book, x + i * kBlock, codes + i * kBlock, absmax + i, n);
    }
  });
}

template <bool SIGNED>
__global__ void __launch_bounds__(kThreads, 2)
    dequantize(const uint8_t* codes, const float* absmax, float* x, int64_t numel, int per_warp) {
  __shared__ Codebook<SIGNED> book;
  for (int i = threadIdx.x; i < 256; i += kThreads) book.value[i] = device_book<SIGNED>().value[i];
  __syncthreads();
  const bool wide = aligned(16, x) && aligned(8, codes);
  for_blocks(int64_t(blockIdx.x) * per_warp * kWarps, per_warp, numel, [&](const auto& block, int64_t i) {
    const int n = length(i, numel);
    if (wide && n == kBlock) {
      dequantize_block<kVector>(block, book, codes + i * kBlock, absmax[i], x + i * kBlock, n);
    } else {
      dequantize_block<1>(block, book, codes + i * kBlock, absmax[i], x + i * kBlock, n);
    }
  });
}

// Where each tensor's thread blocks begin in the grid, and how many blocks of 256 each of their warps has.
template <class List>
struct Grid {
  int first[List::kMost + 1];
  int per_warp;
};

// The tensor of this thread block, and its first block of 256.
template <class List>
__device__ int find(const Grid<List>& grid, int64_t& first) {
  int index = 0;
  while (grid.first[index + 1] <= blockIdx.x) ++index;
  first = int64_t(blockIdx.x - grid.first[index]) * grid.per_warp * kWarps;
  return index;
}

template <class W, class G>
__global__ void __launch_bounds__(kThreads, 2)
    adam(const __grid_constant__ Adam8bitList list, const __grid_constant__ Grid<Adam8bitList> grid,
         const __grid_constant__ AdamWScalars s) {
  if (s.found_inf != nullptr && *s.found_inf != 0.0f) return;
  __shared__ Codebook<true> m_book;
  __shared__ Codebook<false> v_book;
  __shared__ AdamStep step;
  int64_t first;
  const Adam8bitList::Item& item = list.items[find(grid, first)];
  copy(m_book, signed_book);
  copy(v_book, unsigned_book);
  if (threadIdx.x == 0) step = adam_step(s.beta1, s.beta2, s.eps, s.weight_decay, 1.0, read(s.lr), *item.step);
  __syncthreads();

  const Codebooks books{m_book, v_book};
  W* w = static_cast<W*>(item.w);
  const G* g = static_cast<const G*>(item.g);
  const float grad_scale = s.grad_scale == nullptr ? 1.0f : *s.grad_scale;
  const bool wide = aligned(16, w) && aligned(16, g) && aligned(8, item.moments.m, item.moments.v);
  int left_out = 0;
  for_blocks(first, grid.per_warp, item.numel, [&](const auto& block, int64_t i) {
    const int n = length(i, item.numel);
    const Moments8bit moments = at_block(item.moments, i);
    const IntoWeights<W> target{w + i * kBlock};
    left_out += wide && n == kBlock
                    ? adam_8bit_block<kVector>(block, books, g + i * kBlock, target, moments, n, grad_scale, step, EveryChannel{})
                    : adam_8bit_block<1>(block, books, g + i * kBlock, target, moments, n, grad_scale, step, EveryChannel{});
  });
  if (s.skipped != nullptr && left_out > 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(s.skipped), (unsigned long long)left_out);
}

__global__ void __launch_bounds__(kThreads, 2)
    mark(const __grid_constant__ LowRankAdam8bitList list, const __grid_constant__ Grid<LowRankAdam8bitList> grid,
         const __grid_constant__ LowRankAdam8bitScalars s) {
  if (s.found_inf != nullptr && *s.found_inf != 0.0f) return;
  int64_t first;
  const LowRankAdam8bitList::Item& item = list.items[find(grid, first)];
  const float grad_scale = s.grad_scale == nullptr ? 1.0f : *s.grad_scale;
  const int64_t numel = item.rows * item.columns;
  const bool wide = aligned(16, item.r);
  for_blocks(first, grid.per_warp, numel, [&](const auto& block, int64_t i) {
    const int n = length(i, numel);
    if (wide && n == kBlock) {
      mark_channels<kVector>(block, item.r, item.ok, i * kBlock, n, item.columns, s.left, grad_scale);
    } else {
      mark_channels<1>(block, item.r, item.ok, i * kBlock, n, item.columns, s.left, grad_scale);
    }
  });
}

template <class X>
__global__ void __launch_bounds__(kThreads, 2)
    low_rank_adam(const __grid_constant__ LowRankAdam8bitList list, const __grid_constant__ Grid<LowRankAdam8bitList> grid,
                  const __grid_constant__ LowRankAdam8bitScalars s) {
  if (s.found_inf != nullptr && *s.found_inf != 0.0f) return;
  __shared__ Codebook<true> m_book;
  __shared__ Codebook<false> v_book;
  __shared__ AdamStep step;
  int64_t first;
  const LowRankAdam8bitList::Item& item = list.items[find(grid, first)];
  copy(m_book, signed_book);
  copy(v_book, unsigned_book);
  if (threadIdx.x == 0) step = adam_step(s.beta1, s.beta2, s.eps, 0.0, 1.0, 0.0, *item.step);
  __syncthreads();

  const Codebooks books{m_book, v_book};
  X* x = static_cast<X*>(item.x);
  const float grad_scale = s.grad_scale == nullptr ? 1.0f : *s.grad_scale;
  const int64_t numel = item.rows * item.columns;
  const bool wide = aligned(16, item.r) && aligned(16, x) && aligned(8, item.moments.m, item.moments.v);
  for_blocks(first, grid.per_warp, numel, [&](const auto& block, int64_t i) {
    const int n = length(i, numel);
    const Moments8bit moments = at_block(item.moments, i);
    const IntoUpdate<X> target{x + i * kBlock};
    const float* r = item.r + i * kBlock;
    const ChannelFlags channels = channel_flags(item.ok, i * kBlock, item.columns, s.left);
    if (wide && n == kBlock) {
      adam_8bit_block<kVector>(block, books, r, target, moments, n, grad_scale, step, channels);
    } else {
      adam_8bit_block<1>(block, books, r, target, moments, n, grad_scale, step, channels);
    }
  });
}

}  // namespace
LR_END

namespace lowrank {
namespace {

int64_t thread_blocks(int64_t numel, int per_warp) {
  const int64_t each = int64_t(kBlock) * kWarps * per_warp;
  return (numel + each - 1) / each;
}

// A warp takes up to 16 blocks of 256, so that copying the tables is a small part of the work, but fewer where the card would
// not be filled.
cudaError_t blocks_per_warp(int64_t numel, int& per_warp) {
  int device, multiprocessors;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
      error != cudaSuccess)
    return error;
  const int64_t fill = thread_blocks(numel, 1) / (2 * multiprocessors);
  per_warp = int(fill < 1 ? 1 : fill > 16 ? 16 : fill);
  return cudaSuccess;
}

template <class List, class Numel, class Launch>
cudaError_t launch_list(const List& list, const Numel& numel, const Launch& launch) {
  Grid<List> grid = {};
  int64_t total = 0;
  for (int i = 0; i < list.count; ++i) total += numel(list.items[i]);
  if (const cudaError_t error = blocks_per_warp(total, grid.per_warp); error != cudaSuccess) return error;
  for (int i = 0; i < list.count; ++i) grid.first[i + 1] = grid.first[i] + int(thread_blocks(numel(list.items[i]), grid.per_warp));
  if (grid.first[list.count] == 0) return cudaSuccess;
  launch(grid.first[list.count], grid);
  return cudaGetLastError();
}

template <class F>
cudaError_t with_sign(bool is_signed, const F& f) {
  return is_signed ? f(std::true_type{}) : f(std::false_type{});
}

int64_t low_rank_numel(const LowRankAdam8bitList::Item& item) { return item.rows * item.columns; }

}  // namespace

cudaError_t launch_quantize_blockwise(DType dtype, const void* x, uint8_t* codes, float* absmax, int64_t numel, bool is_signed,
                                      cudaStream_t stream) {
  if (numel == 0) return cudaSuccess;
  int per_warp;
  if (const cudaError_t error = blocks_per_warp(numel, per_warp); error != cudaSuccess) return error;
  return with_sign(is_signed, [&](auto sign) {
    return dispatch(dtype, [&](auto type) {
      using X = typename decltype(type)::type;
      quantize<decltype(sign)::value><<<unsigned(thread_blocks(numel, per_warp)), kThreads, 0, stream>>>(
          static_cast<const X*>(x), codes, absmax, numel, per_warp);
      return cudaGetLastError();
    });
  });
}

cudaError_t launch_dequantize_blockwise(const uint8_t* codes, const float* absmax, float* x, int64_t numel, bool is_signed,
                                        cudaStream_t stream) {
  if (numel == 0) return cudaSuccess;
  int per_warp;
  if (const cudaError_t error = blocks_per_warp(numel, per_warp); error != cudaSuccess) return error;
  return with_sign(is_signed, [&](auto sign) {
    dequantize<decltype(sign)::value>
        <<<unsigned(thread_blocks(numel, per_warp)), kThreads, 0, stream>>>(codes, absmax, x, numel, per_warp);
    return cudaGetLastError();
  });
}

cudaError_t launch_adam_8bit(DType w_dtype, DType g_dtype, const Adam8bitList& list, const AdamWScalars& scalars,
                             cudaStream_t stream) {
  return launch_list(
      list, [](const auto& item) { return item.numel; },
      [&](int blocks, const auto& grid) {
        dispatch(w_dtype, [&](auto w) {
          dispatch(g_dtype, [&](auto g) {
            adam<typename decltype(w)::type, typename decltype(g)::type><<<blocks, kThreads, 0, stream>>>(list, grid, scalars);
          });
        });
      });
}

cudaError_t launch_mark_channels(const LowRankAdam8bitList& list, const LowRankAdam8bitScalars& scalars, cudaStream_t stream) {
  return launch_list(list, low_rank_numel,
                     [&](int blocks, const auto& grid) { mark<<<blocks, kThreads, 0, stream>>>(list, grid, scalars); });
}

cudaError_t launch_adam_8bit_low_rank(DType x_dtype, const LowRankAdam8bitList& list, const LowRankAdam8bitScalars& scalars,
                                      cudaStream_t stream) {
  return launch_list(list, low_rank_numel, [&](int blocks, const auto& grid) {
    dispatch(x_dtype,
             [&](auto x) { low_rank_adam<typename decltype(x)::type><<<blocks, kThreads, 0, stream>>>(list, grid, scalars); });
  });
}

}  // namespace lowrank
