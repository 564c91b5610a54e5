// The vectors of csrc/cpu/blockwise.cpp against the block algorithms of core: built for one instruction set, the same bytes.
#include "../../cpu/blockwise.cpp"
#include "check.h"

namespace lowrank {
namespace {

void expect(bool same, const char* name) {
  if (same) return;
  std::printf("%s: vectors differ from core\n", name);
  ++failures;
}

template <class T>
bool equal(const std::vector<T>& a, const std::vector<T>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

struct State {
  std::vector<float> w, m_absmax, v_absmax;
  std::vector<uint8_t> m, v;
  Moments8bit moments() { return {m.data(), v.data(), m_absmax.data(), v_absmax.data()}; }
  bool operator==(const State& o) const {
    return equal(w, o.w) && equal(m_absmax, o.m_absmax) && equal(v_absmax, o.v_absmax) && m == o.m && v == o.v;
  }
};

// Steps of Adam through the table of this instruction set, and block by block through core.
template <class G>
void adam(const char* name, DType dtype, int64_t numel, float scale, double beta1, double beta2) {
  const int64_t blocks = block_count({1, numel});
  const std::vector<float> zeros(blocks);
  State vectors{random<float>(numel, 1), zeros, zeros, std::vector<uint8_t>(numel, 127), std::vector<uint8_t>(numel)};
  State core = vectors;
  for (int step = 1; step <= 6; ++step) {
    const auto g = random<G>(numel, unsigned(step));
    const AdamStep s = adam_step(beta1, beta2, 1e-8, 0.1, 1.0, 1e-3, step);
    const int64_t skipped =
        blockwise_table.adam({DType::f32, dtype, vectors.w.data(), g.data(), vectors.moments(), numel, scale, s}, 0, blocks);
    int64_t expected = 0;
    for (int64_t i = 0; i < blocks; ++i) {
      const BlockAt at = block_at({1, numel}, i);
      expected += adam_8bit_block<1>(OneThread{nullptr}, kBooks, g.data() + at.first, IntoWeights<float>{core.w.data() + at.first},
                                     at_block(core.moments(), i, at.first), at.n, scale, s, EveryChannel{});
    }
    expect(skipped == expected && vectors == core, name);
  }
}

#ifdef __AVX512F__
// All 24-bit quotients' dividends, of both signs, at the ends of the range and beyond it.
void division(float by) {
  const Divisor divisor(by);
  for (const float unit : {1.0f, -0x1p-96f, 0x1p95f, 0x1p-97f, -0x1p-126f, 0x1p-149f, 0x1p104f}) {
    for (int32_t i = 0; i < 1 << 23; i += 16) {
      alignas(64) float x[16], got[16];
      for (int e = 0; e < 16; ++e) x[e] = bits_float(0x3f800000u + uint32_t(i + e)) * unit;
      _mm512_store_ps(got, divisor.divide(_mm512_load_ps(x)));
      for (int e = 0; e < 16; ++e)
        if (float_bits(got[e]) != float_bits(x[e] / by)) return expect(false, "division");
    }
  }
}
#endif

}  // namespace
}  // namespace lowrank

int main() {
  using namespace lowrank;
  adam<float>("fp32", DType::f32, 5000, 1.0f, 0.9, 0.999);
  adam<bf16>("bf16", DType::bf16, 700, 0.5f, 0.9, 0.999);
  adam<fp16>("fp16", DType::f16, 256, 1.0f, 0.0, 0.5);
  adam<float>("tiny gradients", DType::f32, 3000, 1e-25f, 0.9, 0.999);
  adam<float>("huge gradients", DType::f32, 3000, 1e17f, 0.9, 0.95);
#ifdef __AVX512F__
  for (const float by : {1.0f, 0.1f, 0.001f, 0x1.fffffep-1f, 0x1.000002p-10f, 0.271f, 0.0199f, 0x1p-24f, 1e-9f, 0.0f, 2.0f})
    division(by);
#endif
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures != 0;
}
