#include "int4_products.h"

#include "../../cpu/int4.h"

namespace lowrank {
namespace {

// A part of an fp32 matrix whose rows may lie apart.
Tensor block(const Tensor& t, int64_t row, int64_t column, int64_t rows, int64_t columns) {
  return view(t, row * t.stride(0) + column, rows, columns, t.stride(0), 1);
}

// Calls f(panel, vector, entry), panel (vectors, entries) in fp32, until the entries [first, first + count) of all vectors
// have passed; f sees all vectors of an entry before the next.
template <class F>
void for_panels(const Int4& basis, int64_t first, int64_t count, Scratch& scratch, const F& f) {
  constexpr int64_t kPanel = (256 << 10) / sizeof(float), kMostVectors = 256;
  const int64_t vectors = std::min(basis.r, kMostVectors);
  const int64_t entries = std::min(kPanel * torch::stable::get_num_threads() / vectors, std::max<int64_t>(count, 1));
  for (int64_t i = 0; i < count; i += entries) {
    for (int64_t v = 0; v < basis.r; v += vectors) {
      const int64_t high = std::min(vectors, basis.r - v), wide = std::min(entries, count - i);
      const Tensor panel = scratch.matrix(high, wide);
      float* to = data<float>(panel);
      parallel(high, wide, [&](int64_t begin, int64_t end) { int4_kernels().unpack(basis, to, v, first + i, wide, begin, end); });
      f(panel, v, i);
    }
  }
}

}  // namespace

void project_int4_into(const Tensor& r, const Tensor& grad, const Int4& basis, bool left, Scratch& panel, Scratch& tile) {
  // r += the product with a tile of grad that begins at (row, column).
  const auto add = [&](const Tensor& g, int64_t row, int64_t column) {
    const int64_t rows = g.size(0), columns = g.size(1), first = left ? row : column;
    for_panels(basis, first, left ? rows : columns, panel, [&](const Tensor& b, int64_t v, int64_t i) {
      const int64_t vectors = b.size(0), entries = b.size(1);
      if (left) {
        multiply(part(r, v, column, vectors, columns), b, block(g, i, 0, entries, columns), first + i > 0);
      } else {
        multiply(part(r, row, v, rows, vectors), block(g, 0, i, rows, entries), transposed(b, 0, vectors), first + i > 0);
      }
    });
  };
  if (grad.numel() == 0) {
    std::fill_n(data<float>(r), r.numel(), 0.0f);
  } else if (storage(grad) == DType::f32) {
    add(grad, 0, 0);
  } else {
    for_tiles(grad.size(0), grad.size(1),
              [&](int64_t i, int64_t j, int64_t rows, int64_t columns) { add(widened(grad, i, j, rows, columns, tile), i, j); });
  }
}

void back_project_int4_tile(const Tensor& w, int64_t row, int64_t column, const Tensor& x, const Int4& basis, bool left,
                            double beta, double alpha, Scratch& panel) {
  const int64_t rows = w.size(0), columns = w.size(1);
  for_panels(basis, left ? row : column, left ? rows : columns, panel, [&](const Tensor& b, int64_t v, int64_t i) {
    const int64_t vectors = b.size(0), entries = b.size(1);
    const double kept = v == 0 ? beta : 1.0;
    if (left) {
      multiply_into(block(w, i, 0, entries, columns), transposed(b, 0, vectors), part(x, v, column, vectors, columns), kept, alpha);
    } else {
      multiply_into(block(w, 0, i, rows, entries), part(x, row, v, rows, vectors), b, kept, alpha);
    }
  });
}

}  // namespace lowrank
