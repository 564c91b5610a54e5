// AdamW over a chunk of a tensor, element by element.
#pragma once

#include "adam.h"
#include "block.h"
#include "rounding.h"

LR_BEGIN

// One element, number e of `rounding`; returns 1 if its gradient is not usable: then nothing changes.
template <class W, class G, class Rounded>
LR_HD int adamw_element(W& w, G grad, float& m, float& v, float grad_scale, const AdamStep& s, const Rounded& rounding, int e) {
  const float g = to_float(grad) * grad_scale;
  float new_m = m, new_v = v;
  const W new_w = rounding.template round<W>(apply_update(to_float(w), adam_update(g, new_m, new_v, s), s), e);
  const bool ok = usable(g);
  w = choose(ok, new_w, w);
  m = choose(ok, new_m, m);
  v = choose(ok, new_v, v);
  return !ok;
}

// n elements, V at a time (the pointers must then be aligned for it). Returns how many elements this thread left out.
template <int V, class Block, class W, class G, class Rounded = ToNearest>
LR_HD int adamw_chunk(const Block& block, W* w, const G* g, float* m, float* v, int n, float grad_scale, AdamStep s,
                      Rounded rounding = {}) {
  int skipped = 0;
  int whole = 0;
  if constexpr (V > 1) {
    whole = n / V * V;
    for (int i = block.tid * V; i < whole; i += Block::threads * V) {
      auto pw = load<V>(w + i);
      auto pm = load<V>(m + i), pv = load<V>(v + i);
      const auto pg = load<V>(g + i);
      const auto draw = rounding.template at<V>(i);
      for (int e = 0; e < V; ++e) skipped += adamw_element(pw.at[e], pg.at[e], pm.at[e], pv.at[e], grad_scale, s, draw, e);
      store(w + i, pw);
      store(m + i, pm);
      store(v + i, pv);
    }
  }
  LR_SIMD_SUM(skipped)
  for (int i = whole + block.tid; i < n; i += Block::threads)
    skipped += adamw_element(w[i], g[i], m[i], v[i], grad_scale, s, rounding.template at<1>(i), 0);
  return skipped;
}

LR_END
