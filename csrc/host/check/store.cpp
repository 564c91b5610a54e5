#include "../../core/store.h"

#include "check.h"

namespace lowrank {
namespace {

template <class W>
void row(const char* name, int64_t n) {
  compare(name, [&](int threads) {
    auto w = random<W>(n, 7);
    const auto update = random<float>(n, 8);
    std::vector<float> wide(n);
    std::vector<uint8_t> ok(n, 1);
    ok[n / 2] = 0;
    run_block(threads, [&](const auto& block) {
      apply_row(block, w.data(), update.data(), ok.data(), n, 0.9f, -0.1f);
      block.sync();
      round_row<4>(block, w.data(), update.data(), n / 2, Drawing{{1, 2, 3}, 5});
      block.sync();
      widen_row(block, w.data(), wide.data(), n);
    });
    Result result;
    result.add(w), result.add(wide);
    return result;
  });
}

}  // namespace

void check_store() {
  row<float>("store fp32", 500);
  row<bf16>("store bf16", 500);
  row<fp16>("store fp16", 3);
}

}  // namespace lowrank
