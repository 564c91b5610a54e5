#include "../../core/nf4.h"

#include "check.h"

namespace lowrank {
namespace {

// One group of n, to codes and back.
template <int V, class W>
void group(const char* name, int n, unsigned seed) {
  compare(name, [&](int threads) {
    auto w = random<W>(n, seed);
    std::vector<uint8_t> packed((n + 1) / 2);
    std::vector<W> back(n);
    float absmax = 0.0f;
    run_block(threads, [&](const auto& block) {
      quantize_group<V>(block, w.data(), n, packed.data(), &absmax);
      block.sync();
      dequantize_group<V>(block, packed.data(), absmax, n, back.data());
    });
    Result result;
    result.add(packed), result.add(std::vector<float>{absmax}), result.add(back);
    return result;
  });
}

}  // namespace

void check_nf4() {
  group<1, float>("nf4 fp32", 64, 9);
  group<8, float>("nf4 fp32, vectors", 1024, 10);
  group<8, bf16>("nf4 bf16, vectors", 64, 11);
  group<1, fp16>("nf4 fp16, odd", 77, 12);
  group<1, float>("nf4, one element", 1, 13);
}

}  // namespace lowrank
