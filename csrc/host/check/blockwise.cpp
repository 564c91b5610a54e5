#include "../../core/adam_8bit.h"
#include "check.h"

namespace lowrank {
namespace {

const AdamStep kStep = adam_step(0.9, 0.999, 1e-8, 0.1, 0.25, 1e-2, 3);
const Codebook<true> kSigned = make_codebook<true>();
const Codebook<false> kUnsigned = make_codebook<false>();

// f(block, i, its place) for each block.
template <class F>
void for_blocks(int threads, const RowBlocks& blocks, const F& f) {
  run_block(threads, [&](const auto& block) {
    for (int64_t i = 0; i < block_count(blocks); ++i) f(block, i, block_at(blocks, i));
  });
}

template <class X>
void codes(const char* name, const RowBlocks& blocks) {
  compare(name, [&](int threads) {
    const int64_t n = blocks.rows * blocks.columns, count = block_count(blocks);
    const auto x = random<X>(n, 9);
    std::vector<uint8_t> m(n), v(n);
    std::vector<float> m_absmax(count), v_absmax(count), wide(n);
    for_blocks(threads, blocks, [&](const auto& block, int64_t i, const BlockAt& at) {
      quantize_block<1>(block, kSigned, &x[at.first], &m[at.first], &m_absmax[i], at.n);
      quantize_block<1>(block, kUnsigned, &x[at.first], &v[at.first], &v_absmax[i], at.n);
      block.sync();
      dequantize_block<1>(block, kSigned, &m[at.first], m_absmax[i], &wide[at.first], at.n);
    });
    Result result;
    result.add(m), result.add(v), result.add(m_absmax), result.add(v_absmax), result.add(wide);
    return result;
  });
}

struct State {
  std::vector<uint8_t> m, v;
  std::vector<float> m_absmax, v_absmax;

  explicit State(const RowBlocks& blocks)
      : m(blocks.rows * blocks.columns), v(m.size()), m_absmax(block_count(blocks), 0.5f), v_absmax(block_count(blocks), 0.25f) {
    for (size_t i = 0; i < m.size(); ++i) m[i] = uint8_t(i * 7), v[i] = uint8_t(i * 11);
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
    State state({1, n});
    std::atomic<int> skipped = 0;
    for_blocks(threads, {1, n}, [&](const auto& block, int64_t i, const BlockAt& at) {
      skipped += adam_8bit_block<1>(block, Codebooks{kSigned, kUnsigned}, &g[at.first], IntoWeights<W>{&w[at.first]},
                                    at_block(state.moments(), i, at.first), at.n, 0.5f, kStep, EveryChannel{});
    });
    Result result;
    result.add(w), state.add_to(result), result.add(std::vector<int>{skipped});
    return result;
  });
}

void low_rank(const char* name, bool left, const RowBlocks& blocks) {
  compare(name, [&](int threads) {
    const int64_t n = blocks.rows * blocks.columns;
    const auto r = random<float>(n, 12);
    std::vector<float> x(n);
    std::vector<uint8_t> ok(left ? blocks.columns : blocks.rows, 1);
    State state(blocks);
    for_blocks(threads, blocks, [&](const auto& block, int64_t, const BlockAt& at) {
      mark_channels<1>(block, r.data(), ok.data(), at, left, 0.5f);
    });
    for_blocks(threads, blocks, [&](const auto& block, int64_t i, const BlockAt& at) {
      adam_8bit_block<1>(block, Codebooks{kSigned, kUnsigned}, &r[at.first], IntoUpdate<float>{&x[at.first]},
                         at_block(state.moments(), i, at.first), at.n, 0.5f, kStep, channel_flags(ok.data(), at, left));
    });
    Result result;
    result.add(x), result.add(ok), state.add_to(result);
    return result;
  });
}

}  // namespace

void check_blockwise() {
  codes<float>("codes fp32", {1, 700});
  codes<bf16>("codes bf16", {1, 256});
  codes<fp16>("codes fp16", {1, 3});
  codes<float>("codes by row", {3, 300});
  adam<float, float>("8-bit AdamW fp32", 1000);
  adam<bf16, fp16>("8-bit AdamW bf16", 515);
  low_rank("8-bit Adam by columns", true, {7, 300});
  low_rank("8-bit Adam by rows", false, {7, 300});
}

}  // namespace lowrank
