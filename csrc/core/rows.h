// Selected rows, or columns, of a matrix: gather, scatter, and the Adam step of Grass between them.
#pragma once

#include "adam.h"
#include "block.h"
#include "rounding.h"
#include "sparse.h"

LR_BEGIN

LR_HD bool in_range(const SelectedRows& s, int64_t j) { return uint32_t(s.indices[j]) < uint64_t(s.size); }

LR_HD bool counted(const SelectedRows& s, int64_t j) { return in_range(s, j) && s.owner[s.indices[j]] == uint32_t(j); }

LR_HD float scale_of(const SelectedRows& s, int64_t j) { return s.scale == nullptr ? 1.0f : s.scale[j]; }

// to <- scale * from, n elements, V at a time.
template <int V, class Block, class G>
LR_HD void gather_row(const Block& block, const G* from, float* to, int64_t n, float scale) {
  const int64_t whole = V > 1 ? n / V * V : 0;
  for (int64_t i = block.tid * V; i < whole; i += Block::threads * V) {
    const auto g = load<V>(from + i);
    Pack<float, V> r;
    for (int e = 0; e < V; ++e) r.at[e] = to_float(g.at[e]) * scale;
    store(to + i, r);
  }
  LR_SIMD
  for (int64_t i = whole + block.tid; i < n; i += Block::threads) to[i] = to_float(from[i]) * scale;
}

// to[j] <- scale_j * from[indices_j]; 0 for an index out of range.
template <class Block, class G>
LR_HD void gather_columns(const Block& block, const G* from, float* to, const SelectedRows& s) {
  for (int64_t j = block.tid; j < s.count; j += Block::threads)
    to[j] = in_range(s, j) ? to_float(from[s.indices[j]]) * scale_of(s, j) : 0.0f;
}

// w <- w + alpha * x, n elements, V at a time.
template <int V, class Block, class W>
LR_HD void add_row(const Block& block, W* w, const float* x, int64_t n, float alpha) {
  const int64_t whole = V > 1 ? n / V * V : 0;
  for (int64_t i = block.tid * V; i < whole; i += Block::threads * V) {
    auto pack = load<V>(w + i);
    const auto add = load<V>(x + i);
    for (int e = 0; e < V; ++e) pack.at[e] = from_float<W>(to_float(pack.at[e]) + alpha * add.at[e]);
    store(w + i, pack);
  }
  LR_SIMD
  for (int64_t i = whole + block.tid; i < n; i += Block::threads) w[i] = from_float<W>(to_float(w[i]) + alpha * x[i]);
}

// w[indices_j] <- w[indices_j] + alpha * scale_j * x[j]
template <class Block, class W>
LR_HD void add_columns(const Block& block, W* w, const float* x, const SelectedRows& s, float alpha) {
  for (int64_t j = block.tid; j < s.count; j += Block::threads) {
    if (!counted(s, j)) continue;
    W& to = w[s.indices[j]];
    to = from_float<W>(to_float(to) + alpha * scale_of(s, j) * x[j]);
  }
}

// w <- decay * w where ok (null: everywhere), n elements, V at a time.
template <int V, class Block, class W, class Rounded = ToNearest>
LR_HD void decay_row(const Block& block, W* w, const uint8_t* ok, int64_t n, float decay, Rounded rounding = {}) {
  const int64_t whole = V > 1 ? n / V * V : 0;
  for (int64_t i = block.tid * V; i < whole; i += Block::threads * V) {
    auto pack = load<V>(w + i);
    const auto draw = rounding.template at<V>(i);
    for (int e = 0; e < V; ++e)
      pack.at[e] = choose(ok == nullptr || ok[i + e], draw.template round<W>(decay * to_float(pack.at[e]), e), pack.at[e]);
    store(w + i, pack);
  }
  LR_SIMD
  for (int64_t i = whole + block.tid; i < n; i += Block::threads)
    w[i] = choose(ok == nullptr || ok[i], rounding.template at<1>(i).template round<W>(decay * to_float(w[i]), 0), w[i]);
}

// A Grass step of a matrix w (rows of `n` elements), whose moments m and v have the shape of the low-rank gradient.
template <class W, class G, class Rounded = ToNearest>
struct Grass {
  W* w;
  const G* g;
  float *m, *v;
  int64_t n;
  SelectedRows rows;
  float grad_scale;
  AdamStep step;
  Rounded rounding = {};
};

// One selected element, number e of `rounding`: r is its low-rank gradient, rho the scale of its row.
template <class W, class Rounded>
LR_HD void grass_element(bool ok, float r, float rho, W& w, float& m, float& v, const AdamStep& s, const Rounded& rounding, int e) {
  float new_m = m, new_v = v;
  const float x = adam_update(r, new_m, new_v, s);
  w = choose(ok, rounding.template round<W>(apply_update(to_float(w), rho * x, s), e), w);
  m = choose(ok, new_m, m);
  v = choose(ok, new_v, v);
}

// Left: channels are columns. Steps the selected rows of up to STRIP columns from `first`, V neighbours at a time (then
// there must be STRIP of them, aligned). ok, which may be null, gets a flag a column. Returns how many columns this thread
// found unusable.
template <int STRIP, int V, class Block, class W, class G, class Rounded>
LR_HD int grass_columns(const Block& block, const Grass<W, G, Rounded>& a, uint8_t* ok, int64_t first, int columns) {
  constexpr int wide = STRIP / V, across = Block::threads < wide ? Block::threads : wide;
  constexpr int groups = Block::threads / across, packs = wide / across;
  const int lane = block.tid % across, group = block.tid / across;
  const int mine = V > 1 ? packs : (columns > lane ? (columns - 1 - lane) / across + 1 : 0);
  float bad[packs * V] = {};
  for (int64_t j = group; j < a.rows.count; j += groups) {
    if (!counted(a.rows, j)) continue;
    const G* g = a.g + a.rows.indices[j] * a.n + first + lane * V;
    const float rho = scale_of(a.rows, j);
    LR_SIMD
    for (int p = 0; p < mine; ++p) {
      const auto pg = load<V>(g + p * across * V);
      for (int e = 0; e < V; ++e) bad[p * V + e] += usable(to_float(pg.at[e]) * rho * a.grad_scale) ? 0.0f : 1.0f;
    }
  }
  if constexpr (groups > 1) {
    for (int k = 0; k < packs * V; ++k) {
      block.lanes[block.tid] = bad[k];
      block.sync();
      bad[k] = 0;
      for (int other = 0; other < groups; ++other) bad[k] += block.lanes[lane + other * across];
      block.sync();
    }
  }
  for (int64_t j = group; j < a.rows.count; j += groups) {
    if (!counted(a.rows, j)) continue;
    const int64_t row = a.rows.indices[j] * a.n + first + lane * V, at = j * a.n + first + lane * V;
    const float rho = scale_of(a.rows, j);
    const auto rounding = a.rounding.run(a.rows.indices[j] * a.n + first, columns);
    LR_SIMD
    for (int p = 0; p < mine; ++p) {
      const int64_t o = p * across * V;
      const auto pg = load<V>(a.g + row + o);
      auto pw = load<V>(a.w + row + o);
      auto pm = load<V>(a.m + at + o), pv = load<V>(a.v + at + o);
      const auto draw = rounding.template at<V>(lane * V + o);
      for (int e = 0; e < V; ++e)
        grass_element(bad[p * V + e] == 0.0f, to_float(pg.at[e]) * rho * a.grad_scale, rho, pw.at[e], pm.at[e], pv.at[e], a.step,
                      draw, e);
      store(a.w + row + o, pw);
      store(a.m + at + o, pm);
      store(a.v + at + o, pv);
    }
  }
  int skipped = 0;
  for (int k = 0; group == 0 && k < mine * V; ++k) {
    if (ok != nullptr) ok[first + (k / V * across + lane) * V + k % V] = bad[k] == 0.0f;
    skipped += bad[k] != 0.0f;
  }
  return skipped;
}

// Right: the channel is row i; also decays the columns that are not selected. Returns whether it was usable.
template <int V, class Block, class W, class G, class Rounded>
LR_HD bool grass_row(const Block& block, const Grass<W, G, Rounded>& a, int64_t i) {
  const SelectedRows& s = a.rows;
  W* w = a.w + i * a.n;
  const G* g = a.g + i * a.n;
  float *m = a.m + i * s.count, *v = a.v + i * s.count;
  float bad = 0.0f;
  for (int64_t j = block.tid; j < s.count; j += Block::threads)
    if (counted(s, j)) bad += usable(to_float(g[s.indices[j]]) * scale_of(s, j) * a.grad_scale) ? 0.0f : 1.0f;
  if (sum_threads(block, bad) != 0.0f) return false;
  const auto rounding = a.rounding.run(i * a.n, a.n);
  if (a.step.decay != 1.0f) {
    const int64_t whole = V > 1 ? a.n / V * V : 0;
    for (int64_t c = block.tid * V; c < whole; c += Block::threads * V) {
      auto pack = load<V>(w + c);
      const auto owner = load<V>(s.owner + c);
      const auto draw = rounding.template at<V>(c);
      for (int e = 0; e < V; ++e)
        pack.at[e] = choose(owner.at[e] == SelectedRows::kNobody, draw.template round<W>(a.step.decay * to_float(pack.at[e]), e),
                            pack.at[e]);
      store(w + c, pack);
    }
    LR_SIMD
    for (int64_t c = whole + block.tid; c < a.n; c += Block::threads)
      w[c] = choose(s.owner[c] == SelectedRows::kNobody,
                    rounding.template at<1>(c).template round<W>(a.step.decay * to_float(w[c]), 0), w[c]);
    block.sync();
  }
  for (int64_t j = block.tid; j < s.count; j += Block::threads) {
    if (!counted(s, j)) continue;
    const float rho = scale_of(s, j);
    const int64_t c = s.indices[j];
    grass_element(true, to_float(g[c]) * rho * a.grad_scale, rho, w[c], m[j], v[j], a.step, rounding.template at<1>(c), 0);
  }
  return true;
}

LR_END
