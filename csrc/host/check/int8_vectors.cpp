// The vectors of csrc/cpu/int8.cpp against the block algorithms of core: built for one instruction set, the same bytes.
#include "../../cpu/int8.cpp"
#include "check.h"

namespace lowrank {
namespace {

// Updates a matrix through the table of this instruction set, and group by group through core.
template <class G>
void update(const char* name, DType dtype, int64_t rows, int64_t columns, int group_size, uint64_t offset) {
  const auto dense = random<float>(rows * columns, 1);
  auto steps = random<G>(rows * columns, 2);
  const int64_t groups = (columns + group_size - 1) / group_size;
  std::vector<int8_t> codes[2] = {std::vector<int8_t>(rows * columns), {}};
  std::vector<float> scales[2] = {std::vector<float>(rows * groups), {}};
  const auto matrix = [&](int i) { return Int8Matrix{codes[i].data(), scales[i].data(), columns, group_size}; };
  const Matrix weights{DType::f32, const_cast<float*>(dense.data()), columns};
  int8_table.quantize(weights, matrix(0), {0, 0, rows, columns}, 0, rows * groups);
  codes[1] = codes[0], scales[1] = scales[0];
  alignas(64) uint16_t bits[kRandomRoom];
  int64_t rescaled[2] = {0, 0};
  for (uint32_t step = 0; step < 6; ++step) {
    const Int8Update u{step == 3 ? 0.0f : step == 4 ? 3.0f : -0.01f, step == 5 ? 0.3f : 1.0f};
    const RandomStream stream{0x123456789abcdefu, step, 77};
    rescaled[0] +=
        int8_table.update(matrix(0), {dtype, steps.data(), columns}, {0, 0, rows, columns}, {u, stream, offset}, 0, rows * groups);
    const Int8Matrix w = matrix(1);
    for (int64_t i = 0; i < rows * groups; ++i) {
      const int64_t column = i % groups * group_size, element = i / groups * columns + column;
      const int n = w.length(column);
      rescaled[1] += update_group<1>(OneThread{nullptr}, w.codes + element, w.scale + i, steps.data() + element, n, u,
                                     [&](const OneThread& block) {
                                       random_bits(block, stream, offset + uint64_t(element), n, bits);
                                       return bits + (offset + uint64_t(element)) % 8;
                                     });
    }
  }
  const bool same = codes[0] == codes[1] && rescaled[0] == rescaled[1] && rescaled[0] > 0 &&
                    std::memcmp(scales[0].data(), scales[1].data(), scales[0].size() * sizeof(float)) == 0;
  if (same) return;
  std::printf("%s: vectors differ from core\n", name);
  ++failures;
}

}  // namespace
}  // namespace lowrank

int main() {
  using namespace lowrank;
  update<float>("fp32", DType::f32, 9, 1100, 256, 0);
  update<float>("fp32, odd rows", DType::f32, 40, 77, 32, 5);
  update<bf16>("bf16", DType::bf16, 5, 2049, 1024, 8);
  update<fp16>("fp16", DType::f16, 7, 300, 64, 3);
  // The counter's low word passes 2^32.
  update<float>("fp32, far", DType::f32, 4, 520, 256, (uint64_t(1) << 35) - 1040);
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures != 0;
}
