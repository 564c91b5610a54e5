#include "nf4.h"

#include "one_thread.h"
#include "prefetch.h"

namespace lowrank {
inline namespace LR_ISA {
namespace {

// Calls f(packed, absmax, dense, n) for groups [begin, end) of a tile.
template <class T, class F>
void each_group(const Nf4Matrix& w, const Matrix& dense, const Int8Tile& tile, int64_t begin, int64_t end, const F& f) {
  auto* data = static_cast<T*>(dense.data);
  const int64_t across = (tile.columns + w.group_size - 1) / w.group_size;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i / across, j = i % across * w.group_size, column = tile.column + j;
    T* x = data + row * dense.stride + j;
    prefetch(x, w.group_size);
    f(w.packed + (tile.row + row) * w.width() + column / 2, w.absmax + (tile.row + row) * w.groups() + column / w.group_size, x,
      w.length(column));
  }
}

void run_quantize(const Matrix& dense, const Nf4Matrix& w, const Int8Tile& tile, int64_t begin, int64_t end) {
  dispatch(dense.dtype, [&](auto type) {
    using W = typename decltype(type)::type;
    each_group<W>(w, dense, tile, begin, end, [](auto* packed, auto* absmax, auto* x, int n) {
      quantize_nf4_group<1>(OneThread{nullptr}, x, n, packed, absmax);
    });
  });
}

void run_dequantize(const Nf4Matrix& w, const Matrix& dense, const Int8Tile& tile, int64_t begin, int64_t end) {
  dispatch(dense.dtype, [&](auto type) {
    using W = typename decltype(type)::type;
    each_group<W>(w, dense, tile, begin, end, [](auto* packed, auto* absmax, auto* x, int n) {
      dequantize_nf4_group<1>(OneThread{nullptr}, packed, *absmax, n, x);
    });
  });
}

}  // namespace

extern const Nf4Kernels nf4_table;
const Nf4Kernels nf4_table = {run_quantize, run_dequantize};

}  // namespace LR_ISA
}  // namespace lowrank
