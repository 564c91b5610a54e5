#include "../../core/adamw.h"
#include "../../core/low_rank.h"
#include "check.h"

namespace lowrank {
namespace {

const AdamStep kStep = adam_step(0.9, 0.999, 1e-8, 0.1, 0.25, 1e-2, 3);

template <int V, class W, class G>
void adamw(const char* name, int n) {
  compare(name, [&](int threads) {
    auto w = random<W>(n, 1);
    const auto g = random<G>(n, 2);
    auto m = positive(random<float>(n, 3)), v = positive(m);
    std::atomic<int> skipped = 0;
    run_block(threads, [&](const auto& block) {
      const int mine = adamw_chunk<V>(block, w.data(), g.data(), m.data(), v.data(), n, 0.5f, kStep);
      const float all = sum_threads(block, float(mine));
      if (block.tid == 0) skipped = int(all);
    });
    Result result;
    result.add(w), result.add(m), result.add(v), result.add(std::vector<int>{skipped});
    return result;
  });
}

void low_rank(const char* name, bool columns, int64_t high, int64_t wide) {
  compare(name, [&](int threads) {
    auto r = random<float>(high * wide, 4);
    auto m = positive(random<float>(high * wide, 5)), v = positive(m);
    std::vector<uint8_t> ok(columns ? wide : high);
    run_block(threads, [&](const auto& block) {
      for (int64_t c = 0; columns && c < wide; c += kLanes)
        adam_columns(block, &r[c], &m[c], &v[c], &r[c], &ok[c], high, int(wide - c < kLanes ? wide - c : kLanes), wide, 0.5f,
                     kStep);
      for (int64_t i = 0; !columns && i < high; ++i) {
        const bool good = adam_row(block, &r[i * wide], &m[i * wide], &v[i * wide], &r[i * wide], wide, 0.5f, kStep);
        if (block.tid == 0) ok[i] = good;
      }
    });
    Result result;
    result.add(r), result.add(m), result.add(v), result.add(ok);
    return result;
  });
}

}  // namespace

void check_steps() {
  adamw<1, float, float>("adamw fp32", 1000);
  adamw<8, float, float>("adamw fp32, vectors", 4099);
  adamw<8, bf16, bf16>("adamw bf16, vectors", 4099);
  adamw<8, fp16, float>("adamw fp16, vectors", 777);
  low_rank("low-rank Adam by columns", true, 7, 515);
  low_rank("low-rank Adam by one column", true, 300, 1);
  low_rank("low-rank Adam by rows", false, 9, 300);
}

}  // namespace lowrank
