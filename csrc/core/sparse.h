// What the structured sparse algorithms take: a selection of rows, and how to make one. Kernels of every instruction set take
// the same structs.
#pragma once

#include <cstdint>

namespace lowrank {

enum class Method : int { top, sample, sample_replace };

// One selection. `keys` has d entries; `shares` (d), `counts` (d) and `draws` (r) are for sample_replace alone.
struct RowSelection {
  Method method;
  const float* norms;
  int64_t d, r;
  uint64_t* keys;
  uint64_t* shares;  // running sums of whole-number shares
  int32_t *counts, *draws;
  int32_t* indices;
  float* scale;
};

// Which of `size` rows (or columns) are selected. owner[i] is the first j with indices[j] == i, or kNobody: an index that is
// out of range or repeats an earlier one is left out. scale may be null, for ones.
struct SelectedRows {
  static constexpr uint32_t kNobody = 0xffffffffu;
  const int32_t* indices;
  const float* scale;
  const uint32_t* owner;
  int64_t count, size;
};

}  // namespace lowrank
