// The Block policy of N real threads that meet at a barrier: the same interleavings a GPU may have, for the sanitizers.
#pragma once

#include <barrier>
#include <thread>
#include <vector>

#include "../core/block.h"

LR_BEGIN

template <int N>
struct HostBlock {
  static constexpr int threads = N;
  int tid;
  float* lanes;
  std::barrier<>* barrier;
  void sync() const { barrier->arrive_and_wait(); }
};

// Runs f(block) on N threads.
template <int N, class F>
void run_block(const F& f) {
  float lanes[kLanes];
  std::barrier<> barrier(N);
  std::vector<std::thread> threads;
  for (int tid = 0; tid < N; ++tid) threads.emplace_back([&, tid] { f(HostBlock<N>{tid, lanes, &barrier}); });
  for (auto& thread : threads) thread.join();
}

// Runs f(block) on 1, 32 or 256 threads.
template <class F>
void run_block(int n, const F& f) {
  if (n == 1) run_block<1>(f);
  if (n == 32) run_block<32>(f);
  if (n == 256) run_block<256>(f);
}

LR_END
