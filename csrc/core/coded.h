// A matrix in codes, with an fp32 scale for each group of neighbours in a row.
#pragma once

#include "common.h"

namespace lowrank {

// TOGETHER neighbours share an element of the codes; groups begin with one of their own. The last group of a row may be short.
template <class CODE, int TOGETHER>
struct Coded {
  using Code = CODE;
  static constexpr int together = TOGETHER;

  // A group: which one it is, its first element row by row, the first of its codes, and its length.
  struct Group {
    int64_t index, element, code;
    int n;
  };

  Code* codes;
  float* scale;
  int64_t columns;
  int group_size;

  // Codes of a row.
  LR_HD int64_t width() const { return (columns + TOGETHER - 1) / TOGETHER; }
  // Groups of a row.
  LR_HD int64_t groups() const { return (columns + group_size - 1) / group_size; }
  // Elements of the group that begins at `column`.
  LR_HD int length(int64_t column) const { return int(columns - column < group_size ? columns - column : group_size); }

  LR_HD Group group(int64_t index) const {
    const int64_t row = index / groups(), column = index % groups() * group_size;
    return {index, row * columns + column, row * width() + column / TOGETHER, length(column)};
  }
};

}  // namespace lowrank
