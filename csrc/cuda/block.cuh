// The Block policy of N GPU threads: a warp, or a whole thread block.
#pragma once

#include "../core/block.h"

LR_BEGIN

template <int N>
struct GpuBlock {
  static constexpr int threads = N;
  int tid;
  float* lanes;
  LR_HD void sync() const {
#ifdef __CUDA_ARCH__
    if constexpr (N == 32) {
      __syncwarp();
    } else {
      __syncthreads();
    }
#endif
  }
};

LR_END
