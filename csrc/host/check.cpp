// Runs every block algorithm with 1, 32 and 256 threads and compares the bits. Built once for each sanitizer.
#include <atomic>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>

#include "../core/adamw.h"
#include "../core/dtype.h"
#include "../core/low_rank.h"
#include "../core/norms.h"
#include "../core/store.h"
#include "threads.h"

using namespace lowrank;

namespace {

int failures = 0;

template <class T>
std::vector<T> random(int64_t n, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<T> values(n);
  for (T& x : values) x = from_float<T>(normal(generator));
  // Values that are skipped, and values that vanish.
  const float odd[] = {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), 1e30f, 1e-42f, 0.0f};
  for (int i = 0; i < 5 && n > 64; ++i) values[generator() % n] = from_float<T>(odd[i]);
  return values;
}

template <class T>
std::vector<float> positive(const std::vector<T>& values) {
  std::vector<float> squares;
  for (T x : values) squares.push_back(usable(to_float(x)) ? to_float(x) * to_float(x) : 1.0f);
  return squares;
}

// Everything that a run wrote, as bytes.
struct Result {
  std::vector<char> bytes;
  template <class T>
  void add(const std::vector<T>& values) {
    const char* first = reinterpret_cast<const char*>(values.data());
    bytes.insert(bytes.end(), first, first + values.size() * sizeof(T));
  }
};

// run(n) gives the Result of n threads; all must be equal.
template <class F>
void compare(const char* name, const F& run) {
  const Result one = run(1);
  for (int threads : {32, 256}) {
    if (run(threads).bytes == one.bytes) continue;
    std::printf("%s: %d threads differ from one\n", name, threads);
    ++failures;
  }
}

const AdamStep kStep = adam_step(0.9, 0.999, 1e-8, 0.1, 0.25, 1e-2, 3);

template <int V, class W, class G>
void check_adamw(const char* name, int n) {
  compare(name, [&](int threads) {
    auto w = random<W>(n, 1);
    const auto g = random<G>(n, 2);
    auto m = positive(random<float>(n, 3)), v = positive(m);
    std::atomic<int> skipped = 0;
    run_block(threads, [&](const auto& block) {
      const int mine = adamw_chunk<V>(block, w.data(), g.data(), m.data(), v.data(), n, 0.5f, kStep);
      const float all = sum_threads(block, float(mine));
      if (block.tid == 0) skipped = int(all);
    });
    Result result;
    result.add(w), result.add(m), result.add(v), result.add(std::vector<int>{skipped});
    return result;
  });
}

void check_low_rank(const char* name, bool columns, int64_t high, int64_t wide) {
  compare(name, [&](int threads) {
    auto r = random<float>(high * wide, 4);
    auto m = positive(random<float>(high * wide, 5)), v = positive(m);
    std::vector<uint8_t> ok(columns ? wide : high);
    run_block(threads, [&](const auto& block) {
      for (int64_t c = 0; columns && c < wide; c += kLanes)
        adam_columns(block, &r[c], &m[c], &v[c], &r[c], &ok[c], high, int(wide - c < kLanes ? wide - c : kLanes), wide, 0.5f,
                     kStep);
      for (int64_t i = 0; !columns && i < high; ++i) {
        const bool good = adam_row(block, &r[i * wide], &m[i * wide], &v[i * wide], &r[i * wide], wide, 0.5f, kStep);
        if (block.tid == 0) ok[i] = good;
      }
    });
    Result result;
    result.add(r), result.add(m), result.add(v), result.add(ok);
    return result;
  });
}

template <class G>
void check_norms(const char* name, int64_t high, int64_t wide) {
  compare(name, [&](int threads) {
    const auto g = random<G>(high * wide, 6);
    std::vector<float> rows(high), columns(wide);
    run_block(threads, [&](const auto& block) {
      for (int64_t i = 0; i < high; ++i) {
        const float norm = row_norm<1>(block, &g[i * wide], wide);
        if (block.tid == 0) rows[i] = norm;
      }
      for (int64_t c = 0; c < wide; c += kColumns)
        column_norms<1>(block, &g[c], &columns[c], high, int(wide - c < kColumns ? wide - c : kColumns), wide);
    });
    Result result;
    result.add(rows), result.add(columns);
    return result;
  });
}

template <class W>
void check_store(const char* name, int64_t n) {
  compare(name, [&](int threads) {
    auto w = random<W>(n, 7);
    const auto update = random<float>(n, 8);
    std::vector<float> wide(n);
    std::vector<uint8_t> ok(n, 1);
    ok[n / 2] = 0;
    run_block(threads, [&](const auto& block) {
      apply_row(block, w.data(), update.data(), ok.data(), n, 0.9f, -0.1f);
      block.sync();
      widen_row(block, w.data(), wide.data(), n);
    });
    Result result;
    result.add(w), result.add(wide);
    return result;
  });
}

}  // namespace

int main() {
  check_adamw<1, float, float>("adamw fp32", 1000);
  check_adamw<8, float, float>("adamw fp32, vectors", 4099);
  check_adamw<8, bf16, bf16>("adamw bf16, vectors", 4099);
  check_adamw<8, fp16, float>("adamw fp16, vectors", 777);
  check_low_rank("low-rank Adam by columns", true, 7, 515);
  check_low_rank("low-rank Adam by one column", true, 300, 1);
  check_low_rank("low-rank Adam by rows", false, 9, 300);
  check_norms<float>("norms fp32", 5, 515);
  check_norms<bf16>("norms bf16", 20, 33);
  check_norms<fp16>("norms fp16", 1, 7);
  check_store<float>("store fp32", 500);
  check_store<bf16>("store bf16", 500);
  check_store<fp16>("store fp16", 3);
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures != 0;
}
