#include "../../core/residual.h"

#include "check.h"

namespace lowrank {
namespace {

const AdamStep kStep = adam_step(0.9, 0.999, 1e-8, 0.1, 1.0, 1e-2, 3);

void ratio(const char* name, bool columns, int64_t high, int64_t wide) {
  const int64_t channels = columns ? wide : high;
  compare(name, [&](int threads) {
    auto r = random<float>(high * wide, 9);
    auto m = positive(random<float>(high * wide, 10)), v = positive(m);
    std::vector<float> x(high * wide), r_squares(channels), n_squares(channels), norms(channels, 1.0f);
    std::vector<uint8_t> ok(channels);
    norms[channels / 2] = INFINITY;
    const ChannelSquares squares{r_squares.data(), n_squares.data(), norms.data(), ok.data()};
    run_block(threads, [&](const auto& block) {
      for (int64_t c = 0; columns && c < wide; c += kLanes)
        ratio_columns(block, r.data(), m.data(), v.data(), x.data(), squares, c, high, int(wide - c < kLanes ? wide - c : kLanes),
                      wide, 0.5f, kStep);
      for (int64_t i = 0; !columns && i < high; ++i)
        ratio_row(block, &r[i * wide], &m[i * wide], &v[i * wide], &x[i * wide], squares, i, wide, 0.5f, kStep);
    });
    Result result;
    result.add(m), result.add(v), result.add(x), result.add(r_squares), result.add(n_squares), result.add(ok);
    return result;
  });
}

template <class W>
void move(const char* name, int64_t n, bool sign) {
  compare(name, [&](int threads) {
    auto w = random<W>(n, 11);
    const auto g = random<bf16>(n, 12);
    const auto back = random<float>(n, 13), inside = random<float>(n, 14), coefficients = random<float>(n, 15);
    run_block(threads, [&](const auto& block) {
      move_row(block, w.data(), g.data(), back.data(), sign ? inside.data() : nullptr, coefficients.data(), 0.0f, n, 0.9f, -0.1f);
      block.sync();
      move_row(block, w.data(), g.data(), nullptr, nullptr, nullptr, 0.25f, n, 0.9f, -0.1f);
    });
    Result result;
    result.add(w);
    return result;
  });
}

}  // namespace

void check_residual() {
  ratio("norm ratios of columns", true, 7, 515);
  ratio("norm ratios of rows", false, 9, 300);
  move<float>("residual fp32", 500, true);
  move<bf16>("residual bf16", 300, false);
}

}  // namespace lowrank
