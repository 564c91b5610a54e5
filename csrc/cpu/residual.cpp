#include "residual.h"

#include "../core/residual.h"
#include "philox.h"

namespace lowrank {
inline namespace LR_ISA {
namespace {

ChannelSquares squares_of(const Ratio& a) { return {a.r_squares, a.n_squares, a.gradient_norms, a.ok}; }

int64_t run_ratio_columns(const Ratio& a, int64_t begin, int64_t end) {
  const OneThread block{nullptr};
  int64_t skipped = 0;
  for (int64_t c = begin; c < end; c += kLanes)
    skipped += ratio_columns(block, a.r, a.m, a.v, a.x, squares_of(a), c, a.rows, int(smaller(kLanes, end - c)), a.columns,
                             a.grad_scale, a.step);
  return skipped;
}

int64_t run_ratio_rows(const Ratio& a, int64_t begin, int64_t end) {
  float lanes[kLanes];
  int64_t skipped = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t at = i * a.columns;
    skipped += !ratio_row(OneThread{lanes}, a.r + at, a.m + at, a.v + at, a.x == nullptr ? nullptr : a.x + at, squares_of(a), i,
                          a.columns, a.grad_scale, a.step);
  }
  return skipped;
}

void run_square_columns(const Squares& a, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; c += kLanes) {
    const int owned = int(smaller(kLanes, end - c));
    for (int k = 0; k < owned; ++k) a.squares[c + k] = 0.0f;
    square_columns<OneThread>(a.r + c, a.squares + c, a.rows, owned, a.columns, a.factor);
  }
}

void run_square_rows(const Squares& a, int64_t begin, int64_t end) {
  float lanes[kLanes];
  for (int64_t i = begin; i < end; ++i) a.squares[i] = square_row(OneThread{lanes}, a.r + i * a.columns, a.columns, a.factor);
}

void run_move(const Move& a, int64_t begin, int64_t end) {
  dispatch(a.w.dtype, [&](auto w_type) {
    dispatch(a.g.dtype, [&](auto g_type) {
      using W = typename decltype(w_type)::type;
      auto* w = static_cast<W*>(a.w.data);
      const auto* g = static_cast<const typename decltype(g_type)::type*>(a.g.data);
      const auto row = [&](const float* x, int64_t i) { return x == nullptr ? nullptr : x + i * a.columns; };
      with_rounding<W>(a.rounding, a.columns, [&](const auto& rounding) {
        for (int64_t i = begin; i < end; ++i)
          move_row(OneThread{nullptr}, w + i * a.w.stride, g + i * a.g.stride, row(a.back, i), row(a.inside, i),
                   a.column_coefficients, a.row_coefficients == nullptr ? 0.0f : a.row_coefficients[i], a.columns, a.decay, a.alpha,
                   rounding.run(i * a.w.stride, a.columns));
      });
    });
  });
}

void run_combine(float* x, const float* r, const float* row_c, const float* column_c, float p, float q, int64_t columns,
                 int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const float row = row_c == nullptr ? 0.0f : q * row_c[i];
    LR_SIMD
    for (int64_t j = 0; j < columns; ++j) {
      const float c = column_c == nullptr ? row : q * column_c[j];
      x[i * columns + j] = p * x[i * columns + j] - c * r[i * columns + j];
    }
  }
}

}  // namespace

extern const ResidualKernels residual_table;
const ResidualKernels residual_table = {run_ratio_columns, run_ratio_rows, run_square_columns,
                                        run_square_rows,   run_move,       run_combine};

}  // namespace LR_ISA
}  // namespace lowrank
