#include "sparse.h"

#include <algorithm>

#include "../core/rows.h"
#include "../core/selection.h"
#include "philox.h"

namespace lowrank {
inline namespace LR_ISA {
namespace {

constexpr OneThread kOne{nullptr};

template <class T>
T* row(const Matrix& matrix, int64_t i) {
  return static_cast<T*>(matrix.data) + i * matrix.stride;
}

void run_keys(const RowSelection& s, const RandomStream& stream, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) s.keys[i] = row_key(s.method, stream, s.norms, i);
}

void run_select(const RowSelection& s, const RandomStream& stream) {
  s.method == Method::sample_replace ? select_by_draws(kOne, s, stream) : select_by_keys(kOne, s);
}

void run_gather_rows(const Matrix& g, const SelectedRows& s, float* x, int64_t n, int64_t begin, int64_t end) {
  dispatch(g.dtype, [&](auto type) {
    for (int64_t j = begin; j < end; ++j)
      gather_row<1>(kOne, row<typename decltype(type)::type>(g, s.indices[j]), x + j * n, n, scale_of(s, j));
  });
}

void run_gather_columns(const Matrix& g, const SelectedRows& s, float* x, int64_t begin, int64_t end) {
  dispatch(g.dtype, [&](auto type) {
    for (int64_t i = begin; i < end; ++i) gather_columns(kOne, row<typename decltype(type)::type>(g, i), x + i * s.count, s);
  });
}

void run_add_rows(const Matrix& w, const SelectedRows& s, const float* x, int64_t n, float alpha, int64_t begin, int64_t end) {
  dispatch(w.dtype, [&](auto type) {
    for (int64_t j = begin; j < end; ++j)
      add_row<1>(kOne, row<typename decltype(type)::type>(w, s.indices[j]), x + j * n, n, alpha * scale_of(s, j));
  });
}

void run_add_columns(const Matrix& w, const SelectedRows& s, const float* x, float alpha, int64_t begin, int64_t end) {
  dispatch(w.dtype, [&](auto type) {
    for (int64_t i = begin; i < end; ++i) add_columns(kOne, row<typename decltype(type)::type>(w, i), x + i * s.count, s, alpha);
  });
}

// f(Grass<W, G, ...>) for the storage types of the step, and how its weights are rounded: at most `most` in one run.
template <class F>
int64_t with_types(const GrassStep& a, int64_t most, const F& f) {
  return dispatch(a.w.dtype, [&](auto w) {
    return dispatch(a.g.dtype, [&](auto g) {
      using W = typename decltype(w)::type;
      using G = typename decltype(g)::type;
      return with_rounding<W>(a.rounding, most, [&](const auto& rounding) {
        using Rounded = std::decay_t<decltype(rounding)>;
        return f(Grass<W, G, Rounded>{row<W>(a.w, 0), row<G>(a.g, 0), a.m, a.v, a.n, a.rows, a.grad_scale, a.step, rounding});
      });
    });
  });
}

int64_t run_grass_columns(const GrassStep& a, int64_t begin, int64_t end) {
  constexpr int strip = 256;
  return with_types(a, strip, [&](const auto& grass) {
    int64_t skipped = 0;
    for (int64_t c = begin; c < end; c += strip)
      skipped += grass_columns<strip, 1>(kOne, grass, a.ok, c, int(std::min<int64_t>(strip, end - c)));
    return skipped;
  });
}

int64_t run_grass_rows(const GrassStep& a, int64_t begin, int64_t end) {
  return with_types(a, a.n, [&](const auto& grass) {
    int64_t skipped = 0;
    for (int64_t i = begin; i < end; ++i) skipped += !grass_row<1>(kOne, grass, i);
    return skipped;
  });
}

void run_decay_rows(const GrassStep& a, int64_t begin, int64_t end) {
  dispatch(a.w.dtype, [&](auto type) {
    using W = typename decltype(type)::type;
    with_rounding<W>(a.rounding, a.n, [&](const auto& rounding) {
      for (int64_t i = begin; i < end; ++i)
        if (a.rows.owner[i] == SelectedRows::kNobody)
          decay_row<1>(kOne, row<W>(a.w, i), a.ok, a.n, a.step.decay, rounding.run(i * a.n, a.n));
    });
  });
}

}  // namespace

extern const SparseKernels sparse_table;
const SparseKernels sparse_table = {run_keys,        run_select,        run_gather_rows, run_gather_columns, run_add_rows,
                                    run_add_columns, run_grass_columns, run_grass_rows,  run_decay_rows};

}  // namespace LR_ISA
}  // namespace lowrank
