#include "../../core/scatter_add.h"

#include "check.h"

namespace lowrank {
namespace {

// A row of n with an entry in every `gap`-th column, in two parts.
template <class V, class W>
void row(const char* name, int64_t n, int gap) {
  compare(name, [&](int threads) {
    const auto product = random<float>(n, 14);
    const auto values = random<V>(n, 15);
    std::vector<int32_t> columns;
    for (int32_t i = 0; i < n; i += gap) columns.push_back(i);
    const int64_t k = int64_t(columns.size()), half = n / 2;
    const int64_t before = first_at_least(columns.data(), k, half);
    std::vector<W> w(n);
    run_block(threads, [&](const auto& block) {
      merge_row(block, product.data(), 0.25f, values.data(), columns.data(), before, 0, w.data(), half);
      merge_row(block, product.data() + half, 0.25f, values.data() + before, columns.data() + before, k - before, half,
                w.data() + half, n - half);
    });
    Result result;
    result.add(w), result.add(std::vector<int64_t>{before, first_wrong_column(columns.data(), k, n - 1)});
    return result;
  });
}

}  // namespace

void check_scatter_add() {
  row<float, float>("scatter add fp32", 500, 3);
  row<bf16, fp16>("scatter add, narrow", 700, 1);
  row<fp16, bf16>("scatter add, one element", 1, 1);
}

}  // namespace lowrank
