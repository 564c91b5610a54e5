#include "store.h"

#include "../core/store.h"
#include "one_thread.h"

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

extern const StoreKernels store_table;
const StoreKernels store_table = {run_widen, run_apply};

}  // namespace LR_ISA
}  // namespace lowrank
