#include "../../core/norms.h"

#include "check.h"

namespace lowrank {
namespace {

template <class G>
void norms(const char* name, int64_t high, int64_t wide) {
  compare(name, [&](int threads) {
    const auto g = random<G>(high * wide, 6);
    std::vector<float> rows(high), columns(wide), tiles(wide);
    run_block(threads, [&](const auto& block) {
      for (int64_t i = 0; i < high; ++i) {
        const float norm = row_norm<1>(block, &g[i * wide], wide);
        if (block.tid == 0) rows[i] = norm;
      }
      constexpr int four = kOwned<std::decay_t<decltype(block)>> % 4 == 0 ? 4 : 1;
      for (int64_t c = 0; c < wide / kColumns * kColumns && wide % 4 == 0; c += kColumns)
        column_tile_norms<four>(block, &g[c], &tiles[c], high, wide);
      for (int64_t c = 0; c < wide; c += kColumns)
        column_norms<1>(block, &g[c], &columns[c], high, int(wide - c < kColumns ? wide - c : kColumns), wide);
    });
    Result result;
    result.add(rows), result.add(columns), result.add(tiles);
    return result;
  });
}

}  // namespace

void check_norms() {
  norms<float>("norms fp32", 5, 515);
  norms<bf16>("norms bf16", 20, 33);
  norms<fp16>("norms fp16", 1, 7);
  norms<bf16>("norms bf16, whole tiles", 19, 64);
}

}  // namespace lowrank
