// The part of a gradient that a basis does not hold: norm ratios of channels (APOLLO, Fira) and signs (FRUGAL).
#pragma once

#include "adam.h"
#include "block.h"
#include "rounding.h"

LR_BEGIN

// Advances both moments by g and returns M / (sqrt(V) + eps), without bias correction; the moments stay where not ok.
LR_HD float ratio_element(bool ok, float g, float& m, float& v, const AdamStep& s) {
  const float new_m = s.beta1 * m + s.one_minus_beta1 * g, new_v = s.beta2 * v + s.one_minus_beta2 * g * g;
  m = ok ? new_m : m;
  v = ok ? new_v : v;
  return ok ? new_m / (sqrtf(new_v) + s.eps) : 0.0f;
}

// What is known of one channel: the sums of squares of R and of N. A channel is usable iff its squares are finite.
struct ChannelSquares {
  float *r, *n;
  const float* gradient;  // norms of the full gradient, or null
  uint8_t* ok;
  LR_HD bool usable(int64_t c, float squares) const {
    return squares < INFINITY && (gradient == nullptr || gradient[c] < INFINITY);
  }
};

// r <- factor * r in the columns that this thread owns, `owned` of them; adds the squares of each to its sum.
template <class Block>
LR_HD void square_columns(float* r, float* sums, int64_t rows, int owned, int64_t stride, float factor) {
  for (int64_t i = 0; i < rows; ++i) {
    float* row = r + i * stride;
    LR_SIMD
    for (int k = 0; k < owned; ++k) {
      const float g = row[k * Block::threads] * factor;
      row[k * Block::threads] = g;
      sums[k] += g * g;
    }
  }
}

// Channels are `columns` <= 256 neighbouring columns from c on of matrices `stride` wide; R is scaled in place, x gets N if it
// is not null. Returns how many columns of this thread were left out.
template <class Block>
LR_HD int ratio_columns(const Block& block, float* r, float* m, float* v, float* x, const ChannelSquares& squares, int64_t c,
                        int64_t rows, int columns, int64_t stride, float grad_scale, AdamStep s) {
  const int owned = columns > block.tid ? (columns - 1 - block.tid) / Block::threads + 1 : 0;
  float r_sums[kOwned<Block>] = {}, n_sums[kOwned<Block>] = {}, good[kOwned<Block>];
  const int64_t origin = c + block.tid;
  square_columns<Block>(r + origin, r_sums, rows, owned, stride, grad_scale);
  int skipped = 0;
  for (int k = 0; k < owned; ++k) {
    const int64_t channel = origin + k * Block::threads;
    const bool ok = squares.usable(channel, r_sums[k]);
    squares.r[channel] = ok ? r_sums[k] : 0.0f;
    squares.ok[channel] = ok;
    good[k] = ok ? 1.0f : 0.0f;
    skipped += !ok;
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t first = i * stride + origin;
    if (x == nullptr) {
      LR_SIMD
      for (int k = 0; k < owned; ++k) {
        const int64_t at = first + k * Block::threads;
        const float n = ratio_element(good[k] != 0.0f, r[at], m[at], v[at], s);
        n_sums[k] += n * n;
      }
    } else {
      LR_SIMD
      for (int k = 0; k < owned; ++k) {
        const int64_t at = first + k * Block::threads;
        const float n = ratio_element(good[k] != 0.0f, r[at], m[at], v[at], s);
        n_sums[k] += n * n;
        x[at] = n;
      }
    }
  }
  for (int k = 0; k < owned; ++k) squares.n[origin + k * Block::threads] = n_sums[k];
  return skipped;
}

// The sum of f(i) over n elements, in 256 lanes and a fixed tree: every thread gets it.
template <class Block, class F>
LR_HD float sum_elements(const Block& block, int64_t n, const F& f) {
  float sums[kOwned<Block>] = {};
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t base = 0; base < whole; base += kLanes) {
    LR_SIMD
    for (int k = 0; k < kOwned<Block>; ++k) sums[k] += f(base + lane_of<1>(block, k));
  }
  for (int k = 0; k < kOwned<Block>; ++k)
    if (whole + lane_of<1>(block, k) < n) sums[k] += f(whole + lane_of<1>(block, k));
  sum_lanes<1>(block, sums, 1);
  const float sum = block.lanes[0];
  block.sync();
  return sum;
}

// r <- factor * r for one row of n elements; every thread gets the sum of its squares.
template <class Block>
LR_HD float square_row(const Block& block, float* r, int64_t n, float factor) {
  return sum_elements(block, n, [=](int64_t i) {
    const float g = r[i] * factor;
    r[i] = g;
    return g * g;
  });
}

// The channel is row c, of n elements; the pointers are the row's. Returns whether it was usable.
template <class Block>
LR_HD bool ratio_row(const Block& block, float* r, float* m, float* v, float* x, const ChannelSquares& squares, int64_t c,
                     int64_t n, float grad_scale, AdamStep s) {
  const float r_sum = square_row(block, r, n, grad_scale);
  const bool ok = squares.usable(c, r_sum);
  const float n_sum = sum_elements(block, n, [=](int64_t i) {
    const float update = ratio_element(ok, r[i], m[i], v[i], s);
    if (x != nullptr) x[i] = update;
    return update * update;
  });
  if (block.tid == 0) {
    squares.r[c] = ok ? r_sum : 0.0f;
    squares.n[c] = n_sum;
    squares.ok[c] = ok;
  }
  return ok;
}

// How a weight moves: w <- decay * w + alpha * (back + coefficient * g), where the coefficient is NaN the weight stays.
template <class W, class Rounded>
LR_HD void move_element(W& w, float back, float direction, float coefficient, float decay, float alpha, const Rounded& rounding) {
  const W next = rounding.template round<W>(decay * to_float(w) + alpha * (back + coefficient * direction), 0);
  w = choose(coefficient == coefficient, next, w);
}

LR_HD float sign_of(float x) { return float(x > 0.0f) - float(x < 0.0f); }

template <bool VALUE>
struct Flag {
  static constexpr bool value = VALUE;
};

// One row of n weights. `back` may be null, `inside` is null or back(R): then the direction is sign(g - inside), else g.
// `coefficients` has one a column, or is null: then `coefficient` is the row's.
template <class Block, class W, class G, class Rounded = ToNearest>
LR_HD void move_row(const Block& block, W* w, const G* g, const float* back, const float* inside, const float* coefficients,
                    float coefficient, int64_t n, float decay, float alpha, Rounded rounding = {}) {
  const auto each = [&](auto has_back, auto has_inside, auto has_columns) {
    LR_SIMD
    for (int64_t i = block.tid; i < n; i += Block::threads) {
      const float x = to_float(g[i]);
      float direction = x;
      if constexpr (has_inside.value) direction = sign_of(x - inside[i]);
      float projected = 0.0f, scale = coefficient;
      if constexpr (has_back.value) projected = back[i];
      if constexpr (has_columns.value) scale = coefficients[i];
      move_element(w[i], projected, direction, scale, decay, alpha, rounding.template at<1>(i));
    }
  };
  const auto with_columns = [&](auto has_columns) {
    if (inside != nullptr) return each(Flag<true>{}, Flag<true>{}, has_columns);
    if (back != nullptr) return each(Flag<true>{}, Flag<false>{}, has_columns);
    each(Flag<false>{}, Flag<false>{}, has_columns);
  };
  coefficients != nullptr ? with_columns(Flag<true>{}) : with_columns(Flag<false>{});
}

LR_END
