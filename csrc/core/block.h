// What a block algorithm may use. A Block policy has: threads (a compile-time divisor of 256), tid, sync(), and lanes, an
// array of 256 floats that its threads share. Policies: cpu/one_thread.h, host/threads.h and cuda/block.cuh.
#pragma once

#ifndef __CUDACC__
#include <atomic>
#endif

#include "common.h"

LR_BEGIN

constexpr int kLanes = 256;

// Virtual lanes that one thread carries.
template <class Block>
constexpr int kOwned = kLanes / Block::threads;

// The k-th lane of a thread: it owns V neighbours at a time, so that V elements can be loaded at once.
template <int V, class Block>
LR_HD int lane_of(const Block& block, int k) {
  return (block.tid + k / V * Block::threads) * V + k % V;
}

// Sets a flag to 0, as other threads and blocks may do at the same time.
LR_HD void clear(uint8_t* flag) {
#ifdef __CUDACC__
  *reinterpret_cast<volatile uint8_t*>(flag) = 0;
#else
  std::atomic_ref<uint8_t>(*flag).store(0, std::memory_order_relaxed);
#endif
}

// Adds one value a thread; every thread gets the sum. Only for counts and flags, which no order can change.
template <class Block>
LR_HD float sum_threads(const Block& block, float mine) {
  if constexpr (Block::threads == 1) {
    return mine;
  } else {
    block.lanes[block.tid] = mine;
    for (int half = Block::threads / 2; half > 0; half /= 2) {
      block.sync();
      if (block.tid < half) block.lanes[block.tid] += block.lanes[block.tid + half];
    }
    block.sync();
    const float sum = block.lanes[0];
    block.sync();
    return sum;
  }
}

// The largest value a thread; every thread gets it. None may be NaN.
template <class Block>
LR_HD float max_threads(const Block& block, float mine) {
  if constexpr (Block::threads == 1) {
    return mine;
  } else {
    block.lanes[block.tid] = mine;
    for (int half = Block::threads / 2; half > 0; half /= 2) {
      block.sync();
      if (block.tid < half && block.lanes[block.tid] < block.lanes[block.tid + half])
        block.lanes[block.tid] = block.lanes[block.tid + half];
    }
    block.sync();
    const float most = block.lanes[0];
    block.sync();
    return most;
  }
}

// Adds lanes in a fixed tree: the same bits for every number of threads. Lane l ends up in block.lanes[l % width].
template <int V, class Block>
LR_HD void sum_lanes(const Block& block, const float* mine, int width) {
  for (int k = 0; k < kOwned<Block>; ++k) block.lanes[lane_of<V>(block, k)] = mine[k];
  for (int half = kLanes / 2; half >= width; half /= 2) {
    block.sync();
    for (int lane = block.tid; lane < half; lane += Block::threads) block.lanes[lane] += block.lanes[lane + half];
  }
  block.sync();
}

LR_END
