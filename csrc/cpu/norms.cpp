#include "norms.h"

#include "../core/norms.h"
#include "one_thread.h"

namespace lowrank {
inline namespace LR_ISA {
namespace {

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

}  // namespace

extern const NormKernels norm_table;
const NormKernels norm_table = {run_row_norms, run_column_norms};

}  // namespace LR_ISA
}  // namespace lowrank
