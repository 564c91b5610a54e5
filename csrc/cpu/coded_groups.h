// Loops over the groups of a tile, for each coding.
#pragma once

#include "coded.h"
#include "one_thread.h"
#include "prefetch.h"

LR_BEGIN

// Calls f(codes, scale, dense, n, element) for groups [begin, end) of a tile: element counts from the matrix' first.
template <class T, class M, class F>
void each_group(const M& w, const Matrix& dense, const CodedTile& tile, int64_t begin, int64_t end, const F& f) {
  auto* data = static_cast<T*>(dense.data);
  const int64_t across = (tile.columns + w.group_size - 1) / w.group_size, first = tile.column / w.group_size;
  int64_t row = begin / across, group = begin % across;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t j = group * w.group_size, column = tile.column + j;
    auto* codes = w.codes + (tile.row + row) * w.width() + column / M::together;
    float* scale = w.scale + (tile.row + row) * w.groups() + first + group;
    T* x = data + row * dense.stride + j;
    prefetch(x, w.group_size);
    prefetch(codes, w.group_size / M::together);
    f(codes, scale, x, w.length(column), (tile.row + row) * w.columns + column);
    if (++group == across) group = 0, ++row;
  }
}

template <class M>
void run_quantize(const Matrix& dense, const M& w, const CodedTile& tile, int64_t begin, int64_t end) {
  dispatch(dense.dtype, [&](auto type) {
    each_group<typename decltype(type)::type>(w, dense, tile, begin, end, [](auto* codes, auto* scale, auto* x, int n, int64_t) {
      quantize_group<1>(OneThread{nullptr}, x, n, codes, scale);
    });
  });
}

template <class M>
void run_dequantize(const M& w, const Matrix& dense, const CodedTile& tile, int64_t begin, int64_t end) {
  dispatch(dense.dtype, [&](auto type) {
    each_group<typename decltype(type)::type>(w, dense, tile, begin, end, [](auto* codes, auto* scale, auto* x, int n, int64_t) {
      dequantize_group<1>(OneThread{nullptr}, codes, *scale, n, x);
    });
  });
}

LR_END
