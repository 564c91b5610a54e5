// The Block policy of a block with one thread.
#pragma once

#include "../core/common.h"

LR_BEGIN

struct OneThread {
  static constexpr int threads = 1;
  static constexpr int tid = 0;
  float* lanes;
  void sync() const {}
};

LR_END
