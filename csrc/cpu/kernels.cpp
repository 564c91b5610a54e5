// The CPU kernels for one instruction set, LR_ISA: the block algorithms with one thread a block.
#include "kernels.h"

#include "../core/adamw.h"
#include "../core/low_rank.h"
#include "../core/norms.h"
#include "../core/store.h"
#include "one_thread.h"

namespace lowrank {
inline namespace LR_ISA {
namespace {

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t run_adam_columns(const LowRankAdam& a, int64_t begin, int64_t end) {
  const OneThread block{nullptr};
  int64_t skipped = 0;
  for (int64_t c = begin; c < end; c += kLanes)
    skipped += adam_columns(block, a.r + c, a.m + c, a.v + c, a.x + c, a.ok + c, a.rows, int(smaller(kLanes, end - c)),
                            a.columns, a.grad_scale, a.step);
  return skipped;
}

int64_t run_adam_rows(const LowRankAdam& a, int64_t begin, int64_t end) {
  const OneThread block{nullptr};
  int64_t skipped = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t at = i * a.columns;
    a.ok[i] = adam_row(block, a.r + at, a.m + at, a.v + at, a.x + at, a.columns, a.grad_scale, a.step);
    skipped += !a.ok[i];
  }
  return skipped;
}

int64_t run_adamw(const AdamW& a, int64_t begin, int64_t end) {
  constexpr int64_t chunk = 1 << 16;
  const OneThread block{nullptr};
  return dispatch(a.w_dtype, [&](auto w_type) {
    return dispatch(a.g_dtype, [&](auto g_type) {
      auto* w = static_cast<typename decltype(w_type)::type*>(a.w);
      const auto* g = static_cast<const typename decltype(g_type)::type*>(a.g);
      int64_t skipped = 0;
      for (int64_t i = begin; i < end; i += chunk)
        skipped += adamw_chunk<1>(block, w + i, g + i, a.m + i, a.v + i, int(smaller(chunk, end - i)), a.grad_scale, a.step);
      return skipped;
    });
  });
}

void run_row_norms(const Matrix& g, int64_t columns, float* norms, int64_t begin, int64_t end) {
  float lanes[kLanes];
  dispatch(g.dtype, [&](auto type) {
    const auto* data = static_cast<const typename decltype(type)::type*>(g.data);
    for (int64_t i = begin; i < end; ++i) norms[i] = row_norm<1>(OneThread{lanes}, data + i * g.stride, columns);
  });
}

void run_column_norms(const Matrix& g, int64_t rows, float* norms, int64_t begin, int64_t end) {
  constexpr int tiles = 8;
  float lanes[kLanes];
  dispatch(g.dtype, [&](auto type) {
    const auto* data = static_cast<const typename decltype(type)::type*>(g.data);
    for (int64_t c = begin; c < end; c += tiles * kColumns)
      column_norms<tiles>(OneThread{lanes}, data + c, norms + c, rows, int(smaller(tiles * kColumns, end - c)), g.stride);
  });
}

void run_widen(const Matrix& from, float* to, int64_t columns, int64_t begin, int64_t end) {
  dispatch(from.dtype, [&](auto type) {
    const auto* data = static_cast<const typename decltype(type)::type*>(from.data);
    for (int64_t i = begin; i < end; ++i) widen_row(OneThread{nullptr}, data + i * from.stride, to + i * columns, columns);
  });
}

void run_apply(const Matrix& w, const float* update, const uint8_t* ok_rows, const uint8_t* ok_columns, int64_t columns,
               float decay, float alpha, int64_t begin, int64_t end) {
  dispatch(w.dtype, [&](auto type) {
    auto* data = static_cast<typename decltype(type)::type*>(w.data);
    for (int64_t i = begin; i < end; ++i) {
      if (ok_rows != nullptr && !ok_rows[i]) continue;
      apply_row(OneThread{nullptr}, data + i * w.stride, update + i * columns, ok_columns, columns, decay, alpha);
    }
  });
}

}  // namespace

extern const Kernels table;
const Kernels table = {run_adam_columns, run_adam_rows,    run_adamw, run_row_norms,
                       run_column_norms, run_widen, run_apply};

}  // namespace LR_ISA
}  // namespace lowrank
