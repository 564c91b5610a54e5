#include "../../core/int8.h"

#include "check.h"

namespace lowrank {
namespace {

// One group of n: to codes, updated by small steps and by large ones that need a new scale, and back.
template <int V, class G>
void group(const char* name, int n, uint64_t offset) {
  compare(name, [&](int threads) {
    auto w = random<float>(n, 9);
    for (float& x : w) x = is_finite(x) && fabsf(x) < 100.0f ? x : 0.5f;
    const auto steps = random<G>(n, 10);
    std::vector<int8_t> codes(n);
    std::vector<float> scales, back(n);
    std::vector<uint16_t> room(n + 32);
    uint16_t* bits = room.data();
    while (reinterpret_cast<uintptr_t>(bits) % 16 != 0) ++bits;
    std::atomic<int> rescaled = 0;
    float scale = 0.0f;
    run_block(threads, [&](const auto& block) {
      quantize_group<V>(block, w.data(), n, codes.data(), &scale);
      block.sync();
      for (float alpha : {0.0f, 1e-3f, 1.0f, 50.0f}) {
        const bool is_new =
            update_group<V>(block, codes.data(), &scale, steps.data(), n, Int8Update{alpha, 0.9f}, [&](const auto& mine) {
              random_bits(mine, {5, 6, 7}, offset, n, bits);
              return bits + offset % 8;
            });
        block.sync();
        if (block.tid == 0) rescaled += is_new;
      }
      dequantize_group<V>(block, codes.data(), scale, n, back.data());
    });
    Result result;
    result.add(codes), result.add(std::vector<float>{scale}), result.add(back), result.add(std::vector<int>{rescaled});
    return result;
  });
}

}  // namespace

void check_int8() {
  group<1, float>("int8 fp32", 256, 5);
  group<8, float>("int8 fp32, vectors", 1024, 8);
  group<8, bf16>("int8 bf16, vectors", 256, (uint64_t(1) << 35) - 64);
  group<1, fp16>("int8 fp16, short", 77, 3);
  group<1, float>("int8, one element", 1, 0);
}

}  // namespace lowrank
