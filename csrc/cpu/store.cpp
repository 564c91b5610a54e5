#include "store.h"

#include "../core/store.h"
#include "philox.h"

namespace lowrank {
inline namespace LR_ISA {
namespace {

void run_widen(const Matrix& from, float* to, int64_t columns, int64_t begin, int64_t end) {
  dispatch(from.dtype, [&](auto type) {
    const auto* data = static_cast<const typename decltype(type)::type*>(from.data);
    for (int64_t i = begin; i < end; ++i) widen_row(OneThread{nullptr}, data + i * from.stride, to + i * columns, columns);
  });
}

void run_apply(const Matrix& w, const float* update, const uint8_t* ok_rows, const uint8_t* ok_columns, int64_t columns,
               float decay, float alpha, const Rounding& how, int64_t begin, int64_t end) {
  dispatch(w.dtype, [&](auto type) {
    using W = typename decltype(type)::type;
    auto* data = static_cast<W*>(w.data);
    with_rounding<W>(how, columns, [&](const auto& rounding) {
      for (int64_t i = begin; i < end; ++i) {
        if (ok_rows != nullptr && !ok_rows[i]) continue;
        apply_row(OneThread{nullptr}, data + i * w.stride, update + i * columns, ok_columns, columns, decay, alpha,
                  rounding.run(i * w.stride, columns));
      }
    });
  });
}

void run_round(DType dtype, void* w, const float* x, const Rounding& how, int64_t begin, int64_t end) {
  constexpr int64_t chunk = 1 << 12;
  dispatch(dtype, [&](auto type) {
    using W = typename decltype(type)::type;
    with_rounding<W>(how, chunk, [&](const auto& rounding) {
      for (int64_t i = begin; i < end; i += chunk) {
        const int64_t n = smaller(chunk, end - i);
        round_row<1>(OneThread{nullptr}, static_cast<W*>(w) + i, x + i, n, rounding.run(i, n));
      }
    });
  });
}

}  // namespace

extern const StoreKernels store_table;
const StoreKernels store_table = {run_widen, run_apply, run_round};

}  // namespace LR_ISA
}  // namespace lowrank
