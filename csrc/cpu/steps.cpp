#include "steps.h"

#include "../core/adamw.h"
#include "../core/low_rank.h"
#include "philox.h"

namespace lowrank {
inline namespace LR_ISA {
namespace {

int64_t run_adam_columns(const LowRankAdam& a, int64_t begin, int64_t end) {
  const OneThread block{nullptr};
  int64_t skipped = 0;
  for (int64_t c = begin; c < end; c += kLanes)
    skipped += adam_columns(block, a.r + c, a.m + c, a.v + c, a.x + c, a.ok + c, a.rows, int(smaller(kLanes, end - c)), a.columns,
                            a.grad_scale, a.step);
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
      using W = typename decltype(w_type)::type;
      auto* w = static_cast<W*>(a.w);
      const auto* g = static_cast<const typename decltype(g_type)::type*>(a.g);
      return with_rounding<W>(a.rounding, chunk, [&](const auto& rounding) {
        int64_t skipped = 0;
        for (int64_t i = begin; i < end; i += chunk) {
          const int n = int(smaller(chunk, end - i));
          skipped += adamw_chunk<1>(block, w + i, g + i, a.m + i, a.v + i, n, a.grad_scale, a.step, rounding.run(i, n));
        }
        return skipped;
      });
    });
  });
}

}  // namespace

extern const StepKernels step_table;
const StepKernels step_table = {run_adam_columns, run_adam_rows, run_adamw};

}  // namespace LR_ISA
}  // namespace lowrank
