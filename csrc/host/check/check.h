// What the sanitizer executables share: hostile inputs, and runs of one block algorithm whose bytes must agree.
#pragma once

#include <atomic>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../../core/adam.h"
#include "../../core/dtype.h"
#include "../threads.h"

namespace lowrank {

inline int failures = 0;

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

// One function a group of block algorithms.
void check_blockwise();
void check_gaussian();
void check_int4();
void check_int8();
void check_nf4();
void check_norms();
void check_residual();
void check_scatter_add();
void check_sparse();
void check_steps();
void check_store();

}  // namespace lowrank
