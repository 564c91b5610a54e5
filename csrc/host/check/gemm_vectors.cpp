// The products of csrc/cpu/gemm.cpp against plain loops in its order of sums, on this instruction set: the same bits, by one
// thread or by several.
#include <thread>

#include "../../cpu/gemm.cpp"
#include "check.h"

namespace lowrank {
namespace {

// Sum of `depth` products f(k), `block` of them at a time.
template <class F>
float sum(int64_t depth, int64_t block, const F& f) {
  float total = 0.0f;
  for (int64_t first = 0; first < depth; first += block) {
    float part = 0.0f;
    for (int64_t k = first; k < smaller(depth, first + block); ++k) part = f(k, part);
    total = first == 0 ? part : total + part;
  }
  return total;
}

void expect_same(const char* name, const char* what, int threads, const std::vector<float>& got, const std::vector<float>& want) {
  for (size_t i = 0; i < got.size(); ++i) {
    if (float_bits(got[i]) == float_bits(want[i]) || (std::isnan(got[i]) && std::isnan(want[i]))) continue;
    std::printf("%s, %s, %d threads: element %zu is %g, not %g\n", name, what, threads, i, double(got[i]), double(want[i]));
    ++failures;
    return;
  }
}

// f(begin, end) on parts of [0, n), multiples of `unit`, by so many threads at once.
template <class F>
void share(int64_t n, int64_t unit, int threads, const F& f) {
  const int64_t units = (n + unit - 1) / unit, each = (units + threads - 1) / threads;
  std::vector<std::thread> running;
  for (int64_t begin = 0; begin < units; begin += each)
    running.emplace_back([=] { f(begin * unit, smaller(n, (begin + each) * unit)); });
  for (auto& thread : running) thread.join();
}

void products(const char* name, int64_t m, int64_t n, int64_t r) {
  const auto grad = random<float>(m * n, 1), tall = random<float>(m * r, 2), wide = random<float>(n * r, 3);
  const auto at = [&](int64_t i, int64_t j) { return grad[i * n + j]; };
  std::vector<float> right(m * r), left(r * n), got;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < r; ++j)
      right[i * r + j] = sum(n, kGemmDepth, [&](int64_t k, float s) { return std::fma(at(i, k), wide[k * r + j], s); });
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < n; ++j)
      left[i * n + j] = sum(m, kGemmColumnDepth, [&](int64_t k, float s) { return std::fma(tall[k * r + i], at(k, j), s); });

  for (int threads : {1, 3}) {
    Projection p{grad.data(), m, n, wide.data(), r, nullptr};
    got.assign(m * r, 9.0f), p.out = got.data();
    share(m, kGemmRows, threads, [=](int64_t begin, int64_t end) { gemm_table.project_rows(p, begin, end); });
    expect_same(name, "right", threads, got, right);
    p.basis = tall.data(), got.assign(r * n, 9.0f), p.out = got.data();
    share(n, kGemmColumns, threads, [=](int64_t begin, int64_t end) { gemm_table.project_columns(p, begin, end); });
    expect_same(name, "left", threads, got, left);
  }
}

}  // namespace
}  // namespace lowrank

int main() {
  using namespace lowrank;
  products("one", 1, 1, 1);
  products("tails", 70, 131, 9);
  products("depths", 150, 523, 49);
  products("blocks", 131, 400, 300);
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures != 0;
}
