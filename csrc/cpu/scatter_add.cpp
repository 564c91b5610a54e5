#include "scatter_add.h"

#include "../core/scatter_add.h"
#include "one_thread.h"

namespace lowrank {
inline namespace LR_ISA {
namespace {

int64_t run_misplaced(const Entries& s, int64_t n, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t j = first_wrong_column(s.columns + i * s.count, s.count, n);
    if (j < s.count) return i * s.count + j;
  }
  return -1;
}

void run_merge(const float* product, float scale, const Entries& s, int64_t row, int64_t column, const Matrix& w, int64_t columns,
               int64_t begin, int64_t end) {
  dispatch(s.dtype, [&](auto v) {
    dispatch(w.dtype, [&](auto type) {
      const auto* values = static_cast<const typename decltype(v)::type*>(s.values);
      auto* data = static_cast<typename decltype(type)::type*>(w.data);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = (row + i) * s.count;
        const int64_t first = first_at_least(s.columns + at, s.count, column);
        const int64_t last = first_at_least(s.columns + at, s.count, column + columns);
        merge_row(OneThread{nullptr}, product + i * columns, scale, values + at + first, s.columns + at + first, last - first,
                  column, data + i * w.stride, columns);
      }
    });
  });
}

}  // namespace

extern const ScatterAddKernels scatter_add_table;
const ScatterAddKernels scatter_add_table = {run_misplaced, run_merge};

}  // namespace LR_ISA
}  // namespace lowrank
