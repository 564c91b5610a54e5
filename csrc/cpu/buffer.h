// Scratch memory of one thread.
#pragma once

#include <memory>

#include "../core/common.h"

LR_BEGIN

class Buffer {
 public:
  explicit Buffer(int64_t bytes) : lines_(std::make_unique_for_overwrite<Line[]>(size_t(bytes + 63) / 64)) {}
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(lines_.get());
  }

 private:
  struct alignas(64) Line {
    float at[16];
  };
  std::unique_ptr<Line[]> lines_;
};

LR_END
