// Hints for loops over blocks of a row: a processor's own prefetch stops at the end of each page, and arithmetic as long as the
// loads leaves no slack to make up for it.
#pragma once

#include "../core/common.h"

LR_BEGIN

constexpr int kAhead = 1024;  // elements

// Asks for n elements that follow p in kAhead elements, wherever that is.
template <class T>
inline void prefetch(const T* p, int n) {
  const char* bytes = reinterpret_cast<const char*>(p) + kAhead * sizeof(T);
  for (size_t i = 0; i < n * sizeof(T); i += 64) __builtin_prefetch(bytes + i);
}

LR_END
