// Adam whose moments are blockwise 8-bit codes: a block is decoded, advanced and encoded again in one pass.
#pragma once

#include "blockwise.h"
#include "rounding.h"

namespace lowrank {

// Both moments of a tensor, or of a block of it.
struct Moments8bit {
  uint8_t *m, *v;
  float *m_absmax, *v_absmax;  // one a block
};

}  // namespace lowrank

LR_BEGIN

// The moments of block i, whose first element is `first`.
LR_HD Moments8bit at_block(const Moments8bit& all, int64_t i, int64_t first) {
  return {all.m + first, all.v + first, all.m_absmax + i, all.v_absmax + i};
}

// First moments are signed, second ones are not.
struct Codebooks {
  const Codebook<true>& m;
  const Codebook<false>& v;
};

// Where an update goes: into the weights, which keep their bytes where the gradient g is not usable.
template <class W, class Rounded = ToNearest>
struct IntoWeights {
  W* w;
  Rounded rounding = {};

  template <int V>
  LR_HD void put(int lane, const float* g, const float* update, const AdamStep& s) const {
    W old[V];
    load_each<V>(w + lane, [&](int e, W element) { old[e] = element; });
    const auto draw = rounding.template at<V>(lane);
    store_each<V>(w + lane, [&](int e) {
      return choose(usable(g[e]), draw.template round<W>(apply_update(to_float(old[e]), update[e], s), e), old[e]);
    });
  }
};

// Or into X, which is NaN there.
template <class X>
struct IntoUpdate {
  X* x;

  template <int V>
  LR_HD void put(int lane, const float* g, const float* update, const AdamStep&) const {
    const X nan = from_float<X>(bits_float(0x7fc00000));
    store_each<V>(x + lane, [&](int e) { return choose(usable(g[e]), from_float<X>(update[e]), nan); });
  }
};

// Which elements of a block belong to usable channels: all of them.
struct EveryChannel {
  LR_HD bool operator()(int) const { return true; }
};

// Or by a flag a channel, from the block's first on: one for each column if channels are columns (left), else that of its row.
struct ChannelFlags {
  const uint8_t* ok;
  bool left;

  LR_HD bool operator()(int lane) const { return ok[left ? lane : 0] != 0; }
};

LR_HD ChannelFlags channel_flags(const uint8_t* ok, const BlockAt& at, bool left) {
  return {ok + (left ? at.column : at.row), left};
}

// Adam's update; the moments stay as they are where g is not usable.
LR_HD float adam_8bit_element(float g, float& m, float& v, const AdamStep& s) {
  float new_m = m, new_v = v;
  const float update = adam_update(g, new_m, new_v, s);
  m = usable(g) ? new_m : m;
  v = usable(g) ? new_v : v;
  return update;
}

// Decodes both moments of a block, advances them by the owned gradients g and encodes them again.
template <int V, class Block>
LR_HD void advance_moments(const Block& block, const Codebooks& books, const Moments8bit& moments, const float* g, float* update,
                           int owned, const AdamStep& s) {
  float m[kOwned<Block>] = {}, v[kOwned<Block>] = {};
  decode_block<V>(block, books.m, moments.m, *moments.m_absmax, m, owned);
  decode_block<V>(block, books.v, moments.v, *moments.v_absmax, v, owned);
  for_owned<1, Block>(owned, [&](int k) { update[k] = adam_8bit_element(g[k], m[k], v[k], s); });
  // Every thread has read the old absmax before one writes the new: encode_block waits for all in between.
  encode_block<V>(block, books.m, m, moments.m, moments.m_absmax, owned);
  encode_block<V>(block, books.v, v, moments.v, moments.v_absmax, owned);
}

// AdamW on one block of n <= 256 elements. An element whose gradient is not usable, or whose channel is not, keeps its weight,
// and its decoded moments as its block is encoded again; a block of only such elements keeps its bytes. Returns how many
// elements this thread left out.
template <int V, class Block, class G, class Target, class Channels>
LR_HD int adam_8bit_block(const Block& block, const Codebooks& books, const G* grad, const Target& target,
                          const Moments8bit& moments, int n, float grad_scale, const AdamStep& s, const Channels& channels) {
  float g[kOwned<Block>], update[kOwned<Block>];
  const int owned = owned_lanes<V>(block, n);
  for_owned<V, Block>(owned, [&](int k) {
    const int lane = lane_of<V>(block, k);
    load_each<V>(grad + lane, [&](int e, G element) {
      g[k + e] = channels(lane + e) ? to_float(element) * grad_scale : bits_float(0x7fc00000);
    });
  });
  int used = 0;
  for_owned<1, Block>(owned, [&](int k) { used += usable(g[k]); });
  if (sum_threads(block, float(used)) == 0.0f) {
    for_owned<1, Block>(owned, [&](int k) { update[k] = 0.0f; });
  } else {
    advance_moments<V>(block, books, moments, g, update, owned, s);
  }
  for_owned<V, Block>(owned, [&](int k) { target.template put<V>(lane_of<V>(block, k), g + k, update + k, s); });
  return owned - used;
}

// Clears the flags of the channels that a block of r shows to be unusable.
template <int V, class Block>
LR_HD void mark_channels(const Block& block, const float* r, uint8_t* ok, const BlockAt& at, bool left, float grad_scale) {
  const int owned = owned_lanes<V>(block, at.n);
  float values[kOwned<Block>];
  for_owned<V, Block>(owned, [&](int k) {
    load_each<V>(r + at.first + lane_of<V>(block, k), [&](int e, float element) { values[k + e] = element * grad_scale; });
  });
  int bad = 0;
  for_owned<1, Block>(owned, [&](int k) { bad += !usable(values[k]); });
  if (bad == 0) return;
  for (int k = 0; k < kOwned<Block>; ++k)
    if (k < owned && !usable(values[k])) clear(ok + (left ? at.column + lane_of<V>(block, k) : at.row));
}

LR_END
