// What the CPU ops share: raw data, views, scratch memory, threads. Products are torch's own GEMMs, through its C shims.
#pragma once

#include <sys/mman.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <atomic>

#include "../../cpu/store.h"
#include "../rules.h"

namespace lowrank {

// Elements that are worth a thread.
constexpr int64_t kGrain = 1 << 15;
// Storage other than fp32 passes through fp32 in tiles of 4 MiB.
constexpr int64_t kTileSide = 1024, kTileElements = kTileSide * kTileSide;

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// Asks for pages of 2 MiB under memory that is its own mapping, as glibc's is from 32 MiB on: every first touch of a small page
// is a fault, which takes several times as long as writing it.
inline void prefer_large_pages(void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = uintptr_t(1) << 21;
  if (bytes < int64_t(16 * page)) return;
  const uintptr_t begin = (uintptr_t(memory) + page - 1) / page * page, end = (uintptr_t(memory) + uintptr_t(bytes)) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

inline Tensor empty(const Shape& shape, int32_t dtype = aoti_torch_dtype_float32()) {
  const Tensor t = lowrank::empty(shape, Place{aoti_torch_device_type_cpu(), 0}, dtype);
  prefer_large_pages(t.data_ptr(), t.numel() * int64_t(t.element_size()));
  return t;
}

// A view of rows x columns of t's memory; `offset` counts elements from t's first.
inline Tensor view(const Tensor& t, int64_t offset, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
  const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, offset, &out));
  return Tensor(out);
}

// Part of a contiguous matrix, and its transpose.
inline Tensor part(const Tensor& t, int64_t row, int64_t column, int64_t rows, int64_t columns) {
  if (rows == t.size(0) && columns == t.size(1)) return t;
  return view(t, row * t.size(1) + column, rows, columns, t.size(1), 1);
}

inline Tensor transposed(const Tensor& t, int64_t row, int64_t rows) {
  return view(t, row * t.size(1), t.size(1), rows, 1, t.size(1));
}

// Memory for an fp32 matrix that is reused from product to product.
class Scratch {
 public:
  Tensor matrix(int64_t rows, int64_t columns) {
    if (!buffer_ || buffer_->numel() < rows * columns) buffer_ = empty({rows * columns});
    return view(*buffer_, 0, rows, columns, columns, 1);
  }

 private:
  std::optional<Tensor> buffer_;
};

// out <- beta * out + alpha * a b; beta = 0 does not read out.
inline void multiply_into(const Tensor& out, const Tensor& a, const Tensor& b, double beta, double alpha) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), beta, alpha));
}

// out <- a b, or out + a b
inline void multiply(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate = false) {
  if (accumulate) {
    multiply_into(out, a, b, 1, 1);
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  }
}

// Calls f(begin, end) on parts of [0, n), one unit of which is `work` elements.
template <class F>
void parallel(int64_t n, int64_t work, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work));
  if (n > grain) {
    torch::stable::parallel_for(0, n, grain, f);
  } else if (n > 0) {
    f(0, n);
  }
}

// Calls f(row, column, rows, columns) on tiles of an m x n matrix.
template <class F>
void for_tiles(int64_t m, int64_t n, const F& f) {
  if (m == 0 || n == 0) return;
  const int64_t high = std::min(m, kTileSide), wide = std::min(n, kTileElements / high);
  for (int64_t j = 0; j < n; j += wide)
    for (int64_t i = 0; i < m; i += high) f(i, j, std::min(high, m - i), std::min(wide, n - j));
}

inline Tensor widened(const Tensor& t, int64_t row, int64_t column, int64_t rows, int64_t columns, Scratch& scratch) {
  const int64_t width = t.size(1);
  const Matrix from{storage(t), data<char>(t) + (row * width + column) * int64_t(t.element_size()), width};
  const Tensor out = scratch.matrix(rows, columns);
  float* to = data<float>(out);
  parallel(rows, columns, [&](int64_t begin, int64_t end) { store_kernels().widen(from, to, columns, begin, end); });
  return out;
}

inline Tensor as_fp32(const Tensor& t, Scratch& scratch) {
  return storage(t) == DType::f32 ? t : widened(t, 0, 0, t.size(0), t.size(1), scratch);
}

}  // namespace lowrank
