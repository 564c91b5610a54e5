// Blockwise 8-bit codes: a warp a block. Tables of the maps are copied to shared memory, where 32 lookups of a warp
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

// Calls f(block, V, i, its place) on the blocks that this warp has from block `first` on; where `wide`, those that can be are taken
// in vectors.
template <class F>
__device__ void for_blocks(int64_t first, int per_warp, const RowBlocks& blocks, bool wide, const F& f) {
  __shared__ float lanes[kWarps][kWarp];  // reductions of a warp take one lane a thread
  const int warp = threadIdx.x / kWarp;
  const GpuBlock<kWarp> block{int(threadIdx.x % kWarp), lanes[warp]};
  const int64_t count = block_count(blocks);
  for (int k = 0; k < per_warp; ++k) {
    const int64_t i = first + k * kWarps + warp;
    if (i >= count) return;
    const BlockAt at = block_at(blocks, i);
    if (wide && in_vectors<kVector>(at)) {
      f(block, std::integral_constant<int, kVector>{}, i, at);
    } else {
      f(block, std::integral_constant<int, 1>{}, i, at);
    }
  }
}

// Whether all of these begin on `bytes` bytes.
template <class... P>
LR_HD bool aligned(uintptr_t bytes, const P*... pointers) {
  return ((uintptr_t(pointers) | ...) & (bytes - 1)) == 0;
}

template <bool SIGNED, class X>
__global__ void __launch_bounds__(kThreads, 2)
    quantize(const X* x, uint8_t* codes, float* absmax, const RowBlocks blocks, int per_warp) {
  __shared__ Codebook<SIGNED> book;
  copy(book, device_book<SIGNED>());
  __syncthreads();
  const bool wide = aligned(16, x) && aligned(8, codes);
  for_blocks(int64_t(blockIdx.x) * per_warp * kWarps, per_warp, blocks, wide,
             [&](const auto& block, auto v, int64_t i, const BlockAt& at) {
               quantize_block<decltype(v)::value>(block, book, x + at.first, codes + at.first, absmax + i, at.n);
             });
}

template <bool SIGNED>
__global__ void __launch_bounds__(kThreads, 2)
    dequantize(const uint8_t* codes, const float* absmax, float* x, const RowBlocks blocks, int per_warp) {
  __shared__ Codebook<SIGNED> book;
  for (int i = threadIdx.x; i < 256; i += kThreads) book.value[i] = device_book<SIGNED>().value[i];
  __syncthreads();
  const bool wide = aligned(16, x) && aligned(8, codes);
  for_blocks(int64_t(blockIdx.x) * per_warp * kWarps, per_warp, blocks, wide,
             [&](const auto& block, auto v, int64_t i, const BlockAt& at) {
               dequantize_block<decltype(v)::value>(block, book, codes + at.first, absmax[i], x + at.first, at.n);
             });
}

// Where each tensor's thread blocks begin in the grid, and how many blocks each of their warps has.
template <class List>
struct Grid {
  int first[List::kMost + 1];
  int per_warp;
};

// The tensor of this thread block, and its first block.
template <class List>
__device__ int find(const Grid<List>& grid, int64_t& first) {
  int index = 0;
  while (grid.first[index + 1] <= blockIdx.x) ++index;
  first = int64_t(blockIdx.x - grid.first[index]) * grid.per_warp * kWarps;
  return index;
}

// How the weights of an item are rounded.
__device__ ToNearest rounding_of(const Adam8bitList::Item&, uint64_t) { return {}; }

__device__ Drawing rounding_of(const DrawnAdam8bitList::Item& item, uint64_t seed) {
  return {{seed, counter_step(*item.step), item.parameter}, item.offset};
}

template <class W, class G, class List>
__global__ void __launch_bounds__(kThreads, 2) adam(const __grid_constant__ List list, const __grid_constant__ Grid<List> grid,
                                                    const __grid_constant__ AdamWScalars s, uint64_t seed) {
  if (s.found_inf != nullptr && *s.found_inf != 0.0f) return;
  __shared__ Codebook<true> m_book;
  __shared__ Codebook<false> v_book;
  __shared__ AdamStep step;
  int64_t first;
  const typename List::Item& item = list.items[find(grid, first)];
  copy(m_book, signed_book);
  copy(v_book, unsigned_book);
  if (threadIdx.x == 0) step = adam_step(s.beta1, s.beta2, s.eps, s.weight_decay, 1.0, read(s.lr), *item.step);
  __syncthreads();

  const Codebooks books{m_book, v_book};
  W* w = static_cast<W*>(item.w);
  const G* g = static_cast<const G*>(item.g);
  const float grad_scale = s.grad_scale == nullptr ? 1.0f : *s.grad_scale;
  const bool wide = aligned(16, w) && aligned(16, g) && aligned(8, item.moments.m, item.moments.v);
  const auto rounding = rounding_of(item, seed);
  int left_out = 0;
  for_blocks(first, grid.per_warp, {1, item.numel}, wide, [&](const auto& block, auto v, int64_t i, const BlockAt& at) {
    const auto mine = rounding.run(at.first, at.n);
    const IntoWeights<W, std::remove_const_t<decltype(mine)>> target{w + at.first, mine};
    left_out += adam_8bit_block<decltype(v)::value>(block, books, g + at.first, target, at_block(item.moments, i, at.first), at.n,
                                                    grad_scale, step, EveryChannel{});
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
  const bool wide = aligned(16, item.r);
  for_blocks(first, grid.per_warp, item.blocks, wide, [&](const auto& block, auto v, int64_t, const BlockAt& at) {
    mark_channels<decltype(v)::value>(block, item.r, item.ok, at, s.left, grad_scale);
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
  const bool wide = aligned(16, item.r) && aligned(16, x) && aligned(8, item.moments.m, item.moments.v);
  for_blocks(first, grid.per_warp, item.blocks, wide, [&](const auto& block, auto v, int64_t i, const BlockAt& at) {
    adam_8bit_block<decltype(v)::value>(block, books, item.r + at.first, IntoUpdate<X>{x + at.first},
                                        at_block(item.moments, i, at.first), at.n, grad_scale, step,
                                        channel_flags(item.ok, at, s.left));
  });
}

}  // namespace
LR_END

namespace lowrank {
namespace {

int64_t thread_blocks(int64_t count, int per_warp) {
  const int64_t each = int64_t(kWarps) * per_warp;
  return (count + each - 1) / each;
}

// A warp takes up to 16 of `count` blocks, so that copying the tables is a small part of the work, but fewer where the card would
// not be filled.
cudaError_t blocks_per_warp(int64_t count, int& per_warp) {
  int device, multiprocessors;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
      error != cudaSuccess)
    return error;
  const int64_t fill = thread_blocks(count, 1) / (2 * multiprocessors);
  per_warp = int(fill < 1 ? 1 : fill > 16 ? 16 : fill);
  return cudaSuccess;
}

// `blocks_of` an item of the list.
template <class List, class BlocksOf, class Launch>
cudaError_t launch_list(const List& list, const BlocksOf& blocks_of, const Launch& launch) {
  Grid<List> grid = {};
  int64_t total = 0;
  for (int i = 0; i < list.count; ++i) total += block_count(blocks_of(list.items[i]));
  if (const cudaError_t error = blocks_per_warp(total, grid.per_warp); error != cudaSuccess) return error;
  for (int i = 0; i < list.count; ++i)
    grid.first[i + 1] = grid.first[i] + int(thread_blocks(block_count(blocks_of(list.items[i])), grid.per_warp));
  if (grid.first[list.count] == 0) return cudaSuccess;
  launch(grid.first[list.count], grid);
  return cudaGetLastError();
}

template <class F>
cudaError_t with_sign(bool is_signed, const F& f) {
  return is_signed ? f(std::true_type{}) : f(std::false_type{});
}

RowBlocks low_rank_blocks(const LowRankAdam8bitList::Item& item) { return item.blocks; }

}  // namespace

cudaError_t launch_quantize_blockwise(DType dtype, const void* x, uint8_t* codes, float* absmax, const RowBlocks& blocks,
                                      bool is_signed, cudaStream_t stream) {
  const int64_t count = block_count(blocks);
  if (count == 0) return cudaSuccess;
  int per_warp;
  if (const cudaError_t error = blocks_per_warp(count, per_warp); error != cudaSuccess) return error;
  return with_sign(is_signed, [&](auto sign) {
    return dispatch(dtype, [&](auto type) {
      using X = typename decltype(type)::type;
      quantize<decltype(sign)::value><<<unsigned(thread_blocks(count, per_warp)), kThreads, 0, stream>>>(
          static_cast<const X*>(x), codes, absmax, blocks, per_warp);
      return cudaGetLastError();
    });
  });
}

cudaError_t launch_dequantize_blockwise(const uint8_t* codes, const float* absmax, float* x, const RowBlocks& blocks,
                                        bool is_signed, cudaStream_t stream) {
  const int64_t count = block_count(blocks);
  if (count == 0) return cudaSuccess;
  int per_warp;
  if (const cudaError_t error = blocks_per_warp(count, per_warp); error != cudaSuccess) return error;
  return with_sign(is_signed, [&](auto sign) {
    dequantize<decltype(sign)::value>
        <<<unsigned(thread_blocks(count, per_warp)), kThreads, 0, stream>>>(codes, absmax, x, blocks, per_warp);
    return cudaGetLastError();
  });
}

namespace {

template <class List>
cudaError_t launch_adam(DType w_dtype, DType g_dtype, const List& list, const AdamWScalars& scalars, uint64_t seed,
                        cudaStream_t stream) {
  return launch_list(
      list, [](const auto& item) { return RowBlocks{1, item.numel}; },
      [&](int blocks, const auto& grid) {
        dispatch(w_dtype, [&](auto w) {
          dispatch(g_dtype, [&](auto g) {
            adam<typename decltype(w)::type, typename decltype(g)::type, List>
                <<<blocks, kThreads, 0, stream>>>(list, grid, scalars, seed);
          });
        });
      });
}

}  // namespace

cudaError_t launch_adam_8bit(DType w, DType g, const Adam8bitList& list, const AdamWScalars& scalars, cudaStream_t stream) {
  return launch_adam(w, g, list, scalars, 0, stream);
}

cudaError_t launch_adam_8bit(DType w, DType g, const DrawnAdam8bitList& list, const AdamWScalars& scalars, uint64_t seed,
                             cudaStream_t stream) {
  return launch_adam(w, g, list, scalars, seed, stream);
}

cudaError_t launch_mark_channels(const LowRankAdam8bitList& list, const LowRankAdam8bitScalars& scalars, cudaStream_t stream) {
  return launch_list(list, low_rank_blocks,
                     [&](int blocks, const auto& grid) { mark<<<blocks, kThreads, 0, stream>>>(list, grid, scalars); });
}

cudaError_t launch_adam_8bit_low_rank(DType x_dtype, const LowRankAdam8bitList& list, const LowRankAdam8bitScalars& scalars,
                                      cudaStream_t stream) {
  return launch_list(list, low_rank_blocks, [&](int blocks, const auto& grid) {
    dispatch(x_dtype,
             [&](auto x) { low_rank_adam<typename decltype(x)::type><<<blocks, kThreads, 0, stream>>>(list, grid, scalars); });
  });
}

}  // namespace lowrank
