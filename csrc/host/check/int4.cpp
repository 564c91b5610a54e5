#include "../../core/int4.h"

#include "check.h"

namespace lowrank {
namespace {

template <class B>
void int4(const char* name, int64_t d, int64_t r, int group_size) {
  compare(name, [&](int threads) {
    const auto basis = random<B>(d * r, 7);
    Int4 to{nullptr, nullptr, nullptr, d, r, group_size};
    std::vector<uint8_t> packed(r * to.width());
    std::vector<float> scale(r * to.groups()), offset(r * to.groups()), back(d * r);
    to.packed = packed.data(), to.scale = scale.data(), to.offset = offset.data();
    run_block(threads, [&](const auto& block) {
      for (int64_t vector = 0; vector < r; vector += kVectors) {
        for (int64_t group = 0; group < to.groups(); ++group) {
          const Int4Piece p = int4_piece(to, vector, group);
          quantize_int4_group(block, &basis[p.entry * r + p.vector], r, p.at, p.entries, p.vectors);
          // Another thread may read what this one wrote.
          block.sync();
          dequantize_int4_group(block, p.at, &back[p.entry * r + p.vector], r, p.entries, p.vectors);
        }
      }
    });
    Result result;
    result.add(packed), result.add(scale), result.add(offset), result.add(back);
    return result;
  });
}

}  // namespace

void check_int4() {
  int4<float>("int4 fp32", 515, 35, 256);
  int4<bf16>("int4 bf16", 96, 64, 32);
  int4<fp16>("int4 fp16", 33, 3, 1024);
}

}  // namespace lowrank
