// Which r of d rows a structured sparse projection keeps: the r smallest keys, ties to the lower row. A key is an exact
// function of a row's norm and its random bits, so every backend selects the same rows.
#pragma once

#include <cstring>

#include "block.h"
#include "philox.h"
#include "sparse.h"

LR_BEGIN

// 32 random bits of a row. The highest bit of the counter's index is set, where no element of a tensor draws.
LR_HD uint32_t row_word(const RandomStream& stream, int64_t row) {
  return random_group(stream, (uint64_t(1) << 63) | uint64_t(row / 4)).word[row % 4];
}

// -ln((word + 1) / 2^32) by sums, products and quotients alone: a library's log has other last bits on other devices.
LR_HD double exponential(uint32_t word) {
  int e;
  double m = frexp((double(word) + 1.0) * 0x1p-32, &e);
  if (m < 0x1.6a09e667f3bcdp-1) m = 2 * m, e -= 1;  // sqrt(1/2)
  const double s = (m - 1) / (m + 1), z = s * s;
  double series = 0;
  for (int k = 10; k >= 0; --k) series = series * z + 1.0 / (2 * k + 1);
  return 0.0 - (e * 0x1.62e42fefa39efp-1 + 2 * s * series);  // ln 2
}

// The norm of a row, 0 where it is not finite or not positive.
LR_HD float row_weight(float norm) { return norm > 0 && norm < INFINITY ? norm : 0.0f; }

// Largest first.
LR_HD uint64_t top_key(float norm) {
  uint32_t bits;
  const float weight = row_weight(norm);
  memcpy(&bits, &weight, sizeof bits);
  return 0xffffffffu - bits;
}

// An exponential variable of rate `norm`; nonnegative doubles are in the order of their bits.
LR_HD uint64_t sample_key(float norm, uint32_t word) {
  const float weight = row_weight(norm);
  if (weight == 0.0f) return ~uint64_t(0);
  const double key = exponential(word) / double(weight);
  uint64_t bits;
  memcpy(&bits, &key, sizeof bits);
  return bits;
}

LR_HD uint64_t row_key(Method method, const RandomStream& stream, const float* norms, int64_t row) {
  return method == Method::top ? top_key(norms[row]) : sample_key(norms[row], row_word(stream, row));
}

// The k-th smallest key (k from 1), bit by bit. At most 2^24 keys: counts are fp32.
template <class Block>
LR_HD uint64_t kth_smallest(const Block& block, const uint64_t* keys, int64_t n, int64_t k, int bits) {
  uint64_t found = 0;
  for (int bit = bits - 1; bit >= 0; --bit) {
    const uint64_t candidate = found | (uint64_t(1) << bit);
    int64_t below = 0;
    LR_SIMD_SUM(below)
    for (int64_t i = block.tid; i < n; i += Block::threads) below += keys[i] < candidate;
    if (sum_threads(block, float(below)) < float(k)) found = candidate;
  }
  return found;
}

// Exclusive sum over threads of one number each; at most 2^24.
template <class Block>
LR_HD int64_t sum_before(const Block& block, int64_t mine) {
  if constexpr (Block::threads == 1) {
    return 0;
  } else {
    block.lanes[block.tid] = float(mine);
    block.sync();
    float before = 0;
    for (int t = 0; t < block.tid; ++t) before += block.lanes[t];
    block.sync();
    return int64_t(before);
  }
}

// The rows of the r smallest keys, ascending.
template <class Block>
LR_HD void smallest_rows(const Block& block, const RowSelection& s, uint64_t last) {
  const int64_t chunk = (s.d + Block::threads - 1) / Block::threads;
  const int64_t begin = block.tid * chunk < s.d ? block.tid * chunk : s.d, end = begin + chunk < s.d ? begin + chunk : s.d;
  int64_t below = 0, equal = 0;
  for (int64_t i = begin; i < end; ++i) below += s.keys[i] < last, equal += s.keys[i] == last;
  const int64_t below_before = sum_before(block, below), equal_before = sum_before(block, equal);
  const int64_t ties = s.r - int64_t(sum_threads(block, float(below)));  // this many of the equal ones
  int64_t seen = equal_before, at = below_before + (seen < ties ? seen : ties);
  for (int64_t i = begin; i < end; ++i) {
    const bool tie = s.keys[i] == last;
    if (s.keys[i] < last || (tie && seen < ties)) s.indices[at++] = int32_t(i);
    seen += tie;
  }
  block.sync();
}

// 'top' and 'sample', from the keys of all rows. Given the smallest key tau that was not chosen, row j was included with
// probability 1 - exp(-norm_j tau).
template <class Block>
LR_HD void select_by_keys(const Block& block, const RowSelection& s) {
  const int bits = s.method == Method::top ? 32 : 64;
  smallest_rows(block, s, kth_smallest(block, s.keys, s.d, s.r, bits));
  uint64_t next = ~uint64_t(0);
  if (s.method == Method::sample && s.r < s.d) next = kth_smallest(block, s.keys, s.d, s.r + 1, bits);
  double tau;
  memcpy(&tau, &next, sizeof tau);
  for (int64_t j = block.tid; j < s.r; j += Block::threads) {
    const double weight = double(row_weight(s.norms[s.indices[j]]));
    s.scale[j] = next == ~uint64_t(0) || weight == 0 ? 1.0f : float(1 / sqrt(-expm1(-weight * tau)));
  }
}

// r independent draws. A row's share of all draws is a whole number, so sums of shares are exact in any order.
template <class Block>
LR_HD void select_by_draws(const Block& block, const RowSelection& s, const RandomStream& stream) {
  const int64_t chunk = (s.d + Block::threads - 1) / Block::threads;
  const int64_t begin = block.tid * chunk < s.d ? block.tid * chunk : s.d, end = begin + chunk < s.d ? begin + chunk : s.d;
  float largest = 0;
  for (int64_t i = begin; i < end; ++i) largest = row_weight(s.norms[i]) > largest ? row_weight(s.norms[i]) : largest;
  if constexpr (Block::threads > 1) {
    block.lanes[block.tid] = largest;
    block.sync();
    for (int t = 0; t < Block::threads; ++t) largest = block.lanes[t] > largest ? block.lanes[t] : largest;
    block.sync();
  }
  // Running sums: each thread's own rows, then the sums of the threads before it, which are the last ones of their chunks.
  uint64_t sum = 0;
  for (int64_t i = begin; i < end; ++i) {
    const float weight = row_weight(s.norms[i]);
    if (weight > 0) sum += uint64_t(double(weight) / double(largest) * 2147483647.0) + 1;
    s.shares[i] = sum;
    s.counts[i] = 0;
  }
  block.sync();
  uint64_t before = 0;
  for (int64_t last = chunk - 1; last < begin; last += chunk) before += s.shares[last];
  block.sync();
  for (int64_t i = begin; i < end; ++i) s.shares[i] += before;
  block.sync();

  const uint64_t total = s.shares[s.d - 1];
  for (int64_t k = block.tid; k < s.r && total > 0; k += Block::threads) {
    // floor(u * total / 2^31), in halves: the product would overflow.
    const uint64_t u = row_word(stream, k) >> 1;
    const uint64_t at = u * (total >> 31) + (u * (total & 0x7fffffff) >> 31);
    int64_t low = 0, high = s.d - 1;  // the first row whose running sum exceeds `at`
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (s.shares[middle] > at) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    s.draws[k] = int32_t(low);
  }
  block.sync();
  // The first draw of a row writes its count.
  for (int64_t k = block.tid; k < s.r && total > 0; k += Block::threads) {
    int32_t count = 0;
    bool first = true;
    for (int64_t other = 0; other < s.r; ++other) {
      const bool same = s.draws[other] == s.draws[k];
      count += same;
      first = first && !(same && other < k);
    }
    if (first) s.counts[s.draws[k]] = count;
  }
  block.sync();
  for (int64_t i = begin; i < end; ++i) s.keys[i] = s.counts[i] == 0;
  block.sync();
  smallest_rows(block, s, kth_smallest(block, s.keys, s.d, s.r, 1));
  for (int64_t j = block.tid; j < s.r; j += Block::threads) {
    const int32_t row = s.indices[j];
    const uint64_t share = s.shares[row] - (row > 0 ? s.shares[row - 1] : 0);
    const double count = s.counts[row];
    s.scale[j] = count > 0 ? float(sqrt(count * double(total) / (double(s.r) * double(share)))) : 0.0f;
  }
}

LR_END
