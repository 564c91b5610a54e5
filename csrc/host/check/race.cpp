// A norm whose threads do not wait for each other: the thread sanitizer must report it.
#include <cstdio>

#include "../../core/norms.h"
#include "../threads.h"

using namespace lowrank;

struct NoBarrier : HostBlock<32> {
  void sync() const {}
};

int main() {
  const std::vector<float> g(1000, 1.0f);
  float norm = 0;
  run_block<32>([&](const auto& block) {
    const float mine = row_norm<1>(NoBarrier{block}, g.data(), 1000);
    if (block.tid == 0) norm = mine;
  });
  std::printf("%f\n", norm);
}
