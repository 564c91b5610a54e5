// A weight that is low-rank plus sparse, W = scale P + S for a product P of two factors: S has k entries a row, in rising columns.
#pragma once

#include "convert.h"

LR_BEGIN

// How many of k rising columns are below `column`.
LR_HD int64_t first_at_least(const int32_t* columns, int64_t k, int64_t column) {
  int64_t low = 0;
  while (low < k) {
    const int64_t middle = low + (k - low) / 2;
    if (columns[middle] < column) {
      low = middle + 1;
    } else {
      k = middle;
    }
  }
  return low;
}

// The first of k columns that is not above the one before it, or not in [0, n); k if there is none.
LR_HD int64_t first_wrong_column(const int32_t* columns, int64_t k, int64_t n) {
  uint32_t wrong = 0;
  LR_SIMD_MAX(wrong)
  for (int64_t j = 1; j < k; ++j) wrong = columns[j] <= columns[j - 1] ? 1u : wrong;
  if (k == 0 || (columns[0] >= 0 && wrong == 0 && columns[k - 1] < n)) return k;
  int64_t j = 0;
  while (columns[j] > (j > 0 ? columns[j - 1] : -1) && columns[j] < n) ++j;
  return j;
}

// w <- scale * product + S for n neighbours of a row, the first of which is column `first`: k entries of S are there. The product
// may be w itself, with a scale of 1.
template <class Block, class V, class W>
LR_HD void merge_row(const Block& block, const float* product, float scale, const V* values, const int32_t* columns, int64_t k,
                     int64_t first, W* w, int64_t n) {
  if (static_cast<const void*>(product) != w) {
    LR_SIMD
    for (int64_t i = block.tid; i < n; i += Block::threads) w[i] = from_float<W>(scale * product[i]);
    block.sync();
  }
  for (int64_t j = block.tid; j < k; j += Block::threads) {
    const int64_t i = columns[j] - first;
    w[i] = from_float<W>(scale * product[i] + to_float(values[j]));
  }
}

LR_END
