#include "../../core/adam_8bit.h"
#include "check.h"

namespace lowrank {
namespace {

const AdamStep kStep = adam_step(0.9, 0.999, 1e-8, 0.1, 0.25, 1e-2, 3);
const Codebook<true> kSigned = make_codebook<true>();
const Codebook<false> kUnsigned = make_codebook<false>();

// f(block, i, n) for blocks of n elements from i on.
template <class F>
void for_blocks(int threads, int64_t numel, const F& f) {
  run_block(threads, [&](const auto& block) {
    for (int64_t i = 0; i < numel; i += kBlock) f(block, i, int(numel - i < kBlock ? numel - i : kBlock));
  });
}

template <class X>
void codes(const char* name, int64_t n) {
  compare(name, [&](int threads) {
    const auto x = random<X>(n, 9);
    std::vector<uint8_t> m(n), v(n);
    std::vector<float> m_absmax(n / kBlock + 1), v_absmax(n / kBlock + 1), wide(n);
    for_blocks(threads, n, [&](const auto& block, int64_t i, int count) {
      quantize_block<1>(block, kSigned, &x[i], &m[i], &m_absmax[i / kBlock], count);
      quantize_block<1>(block, kUnsigned, &x[i], &v[i], &v_absmax[i / kBlock], count);
      block.sync();
      dequantize_block<1>(block, kSigned, &m[i], m_absmax[i / kBlock], &wide[i], count);
    });
    Result result;
    result.add(m), result.add(v), result.add(m_absmax), result.add(v_absmax), result.add(wide);
    return result;
  });
}

struct State {
  std::vector<uint8_t> m, v;
  std::vector<float> m_absmax, v_absmax;

  explicit State(int64_t n) : m(n), v(n), m_absmax(n / kBlock + 1, 0.5f), v_absmax(n / kBlock + 1, 0.25f) {
    for (int64_t i = 0; i < n; ++i) m[i] = uint8_t(i * 7), v[i] = uint8_t(i * 11);
  }

  Moments8bit moments() { return {m.data(), v.data(), m_absmax.data(), v_absmax.data()}; }

  void add_to(Result& result) const { result.add(m), result.add(v), result.add(m_absmax), result.add(v_absmax); }
};

template <class W, class G>
void adam(const char* name, int64_t n) {
  compare(name, [&](int threads) {
    auto w = random<W>(n, 10);
    auto g = random<G>(n, 11);
    for (int64_t i = 256; i < 512 && i < n; ++i) g[i] = from_float<G>(std::numeric_limits<float>::infinity());
    State state(n);
    std::atomic<int> skipped = 0;
    for_blocks(threads, n, [&](const auto& block, int64_t i, int count) {
      skipped += adam_8bit_block<1>(block, Codebooks{kSigned, kUnsigned}, &g[i], IntoWeights<W>{&w[i]},
                                    at_block(state.moments(), i / kBlock), count, 0.5f, kStep, EveryChannel{});
    });
    Result result;
    result.add(w), state.add_to(result), result.add(std::vector<int>{skipped});
    return result;
  });
}

void low_rank(const char* name, bool left, int64_t rows, int64_t columns) {
  compare(name, [&](int threads) {
    const int64_t n = rows * columns;
    const auto r = random<float>(n, 12);
    std::vector<float> x(n);
    std::vector<uint8_t> ok(left ? columns : rows, 1);
    State state(n);
    for_blocks(threads, n, [&](const auto& block, int64_t i, int count) {
      mark_channels<1>(block, r.data(), ok.data(), i, count, columns, left, 0.5f);
    });
    for_blocks(threads, n, [&](const auto& block, int64_t i, int count) {
      adam_8bit_block<1>(block, Codebooks{kSigned, kUnsigned}, &r[i], IntoUpdate<float>{&x[i]},
                         at_block(state.moments(), i / kBlock), count, 0.5f, kStep, channel_flags(ok.data(), i, columns, left));
    });
    Result result;
    result.add(x), result.add(ok), state.add_to(result);
    return result;
  });
}

}  // namespace

void check_blockwise() {
  codes<float>("codes fp32", 700);
  codes<bf16>("codes bf16", 256);
  codes<fp16>("codes fp16", 3);
  adam<float, float>("8-bit AdamW fp32", 1000);
  adam<bf16, fp16>("8-bit AdamW bf16", 515);
  low_rank("8-bit Adam by columns", true, 7, 130);
  low_rank("8-bit Adam by rows", false, 7, 130);
}

}  // namespace lowrank
