#include "residual.h"

#include "../core/residual.h"
#include "one_thread.h"

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

void run_move(const Move& a, int64_t begin, int64_t end) {
  dispatch(a.w.dtype, [&](auto w_type) {
    dispatch(a.g.dtype, [&](auto g_type) {
      auto* w = static_cast<typename decltype(w_type)::type*>(a.w.data);
      const auto* g = static_cast<const typename decltype(g_type)::type*>(a.g.data);
      const auto row = [&](const float* x, int64_t i) { return x == nullptr ? nullptr : x + i * a.columns; };
      for (int64_t i = begin; i < end; ++i)
        move_row(OneThread{nullptr}, w + i * a.w.stride, g + i * a.g.stride, row(a.back, i), row(a.inside, i),
                 a.column_coefficients, a.row_coefficients == nullptr ? 0.0f : a.row_coefficients[i], a.columns, a.decay, a.alpha);
    });
  });
}

void run_combine(float* x, const float* r, const float* row_q, const float* column_q, float p, float q, int64_t columns,
                 int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const float row = row_q == nullptr ? 0.0f : q * row_q[i];
    LR_SIMD
    for (int64_t j = 0; j < columns; ++j) {
      const float c = column_q == nullptr ? row : q * column_q[j];
      const float next = p * x[i * columns + j] - c * r[i * columns + j];
      x[i * columns + j] = c == c ? next : 0.0f;
    }
  }
}

}  // namespace

extern const ResidualKernels residual_table;
const ResidualKernels residual_table = {run_ratio_columns, run_ratio_rows, run_move, run_combine};

}  // namespace LR_ISA
}  // namespace lowrank
