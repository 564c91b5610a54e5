#include <algorithm>

#include "../../core/rows.h"
#include "../../core/selection.h"
#include "check.h"

namespace lowrank {
namespace {

void selection(const char* name, Method method, int64_t d, int64_t r) {
  compare(name, [&](int threads) {
    auto norms = random<float>(d, 9);
    for (float& norm : norms) norm = std::abs(norm);
    norms[d / 2] = norms[d / 3];
    std::vector<uint64_t> keys(d), shares(d);
    std::vector<int32_t> counts(d), draws(r), indices(r);
    std::vector<float> scale(r);
    const RowSelection s{method,       norms.data(),   d,           r, keys.data(), shares.data(), counts.data(),
                         draws.data(), indices.data(), scale.data()};
    const RandomStream stream{3, 4, 5};
    run_block(threads, [&](const auto& block) {
      if (method == Method::sample_replace) return select_by_draws(block, s, stream);
      for (int64_t i = block.tid; i < d; i += std::decay_t<decltype(block)>::threads)
        keys[i] = row_key(method, stream, norms.data(), i);
      block.sync();
      select_by_keys(block, s);
    });
    Result result;
    result.add(indices), result.add(scale);
    return result;
  });
}

template <int V, class W, class G>
void grass(const char* name, bool left, int64_t high, int64_t wide, int count) {
  compare(name, [&](int threads) {
    const int64_t size = left ? high : wide, moments = count * (left ? wide : high);
    auto w = random<W>(high * wide, 1);
    const auto g = random<G>(high * wide, 2);
    auto m = positive(random<float>(moments, 3)), v = positive(m);
    // Two indices that count for nothing: out of range, and repeated.
    std::vector<int32_t> indices(count);
    for (int j = 0; j < count; ++j) indices[j] = int32_t((j * 7 + 3) % size);
    indices[0] = int32_t(size), indices[count - 1] = indices[1];
    std::vector<uint32_t> owner(size, SelectedRows::kNobody);
    for (int j = count - 1; j > 0; --j) owner[indices[j]] = uint32_t(j);
    const auto scale = std::vector<float>(count, 1.5f);
    std::vector<uint8_t> ok(wide);
    const Grass<W, G> step{w.data(), g.data(),
                           m.data(), v.data(),
                           wide,     {indices.data(), scale.data(), owner.data(), count, size},
                           0.5f,     adam_step(0.9, 0.999, 1e-8, 0.1, 0.25, 1e-2, 3)};
    std::vector<float> low_rank(moments);
    run_block(threads, [&](const auto& block) {
      for (int64_t i = 0; !left && i < high; ++i) {
        grass_row<V>(block, step, i);
        block.sync();
        gather_columns(block, g.data() + i * wide, &low_rank[i * count], step.rows);
        add_columns(block, w.data() + i * wide, &m[i * count], step.rows, 0.25f);
      }
      for (int64_t c = 0; left && c < wide; c += 32)
        grass_columns<32, V>(block, step, ok.data(), c, int(std::min<int64_t>(32, wide - c)));
      block.sync();
      for (int64_t i = 0; left && i < high; ++i)
        if (owner[i] == SelectedRows::kNobody) decay_row<V>(block, w.data() + i * wide, ok.data(), wide, 0.9f);
      block.sync();
      for (int64_t j = 0; left && j < count; ++j) {
        if (in_range(step.rows, j)) gather_row<V>(block, g.data() + indices[j] * wide, &low_rank[j * wide], wide, scale[j]);
        if (counted(step.rows, j)) add_row<V>(block, w.data() + indices[j] * wide, &m[j * wide], wide, 0.25f);
      }
    });
    Result result;
    result.add(w), result.add(m), result.add(v), result.add(ok), result.add(low_rank);
    return result;
  });
}

}  // namespace

void check_sparse() {
  selection("top rows", Method::top, 100, 20);
  selection("sampled rows", Method::sample, 60, 9);
  selection("drawn rows", Method::sample_replace, 300, 40);
  selection("all of few rows", Method::sample, 5, 5);
  grass<1, float, float>("grass left", true, 20, 45, 9);
  grass<4, bf16, float>("grass left, vectors", true, 20, 64, 9);
  grass<1, fp16, bf16>("grass right", false, 9, 45, 6);
  grass<4, float, bf16>("grass right, vectors", false, 9, 64, 6);
}

}  // namespace lowrank
