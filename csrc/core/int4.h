// INT4 groups of a basis vector: value = offset + scale * code. Byte i holds entry 2 i in its low nibble and 2 i + 1 in its
// high one.
#pragma once

#include "block.h"
#include "convert.h"

namespace lowrank {

// A quantized basis (d, r): a row of packed, scale and offset for each of the r vectors.
struct Int4 {
  uint8_t* packed;
  float *scale, *offset;
  int64_t d, r;
  int group_size;
  LR_HD int64_t width() const { return (d + 1) / 2; }
  LR_HD int64_t groups() const { return (d + group_size - 1) / group_size; }
};

}  // namespace lowrank

LR_BEGIN

// The least power of two whose 15th part is a normal number: a group whose range is smaller is stored as its minimum.
constexpr float kNarrow = 0x1p-122f;

struct Int4Group {
  float scale, offset, inverse;
};

// NaN stays, whichever comes first.
LR_HD float least(float a, float b) { return b < a || b != b ? b : a; }
LR_HD float greatest(float a, float b) { return b > a || b != b ? b : a; }

// A group that holds NaN or infinity, or whose range overflows, is NaN throughout.
LR_HD Int4Group int4_group(float low, float high) {
  const float range = high - low, nan = bits_float(0x7fc00000u);
  const bool finite = range <= 0x1.fffffep127f, wide = range >= kNarrow;
  // Adding 0 makes one zero of the two.
  return {finite ? (wide ? range / 15.0f : 0.0f) : nan, finite ? low + 0.0f : nan, finite && wide ? 15.0f / range : 0.0f};
}

// (x - offset) * (15 / range), each rounded once, then to the nearest integer, ties to even. At most 15 (1 + 2^-23): no clamp.
LR_HD uint32_t int4_code(float x, const Int4Group& group) {
  const float code = (x - group.offset) * group.inverse;
  // 1.5 * 2^23 has a unit in the last place of 1.
  return float_bits((code > 0.0f ? code : 0.0f) + 0x1.8p23f) & 15;
}

LR_HD float int4_value(uint32_t code, float scale, float offset) { return offset + scale * float(int32_t(code)); }

constexpr int kVectors = 32;

// One group of up to 32 neighbouring vectors: `at` begins with it.
struct Int4Piece {
  Int4 at;
  int64_t entry, vector;
  int entries, vectors;
};

LR_HD Int4Piece int4_piece(const Int4& basis, int64_t vector, int64_t group) {
  const int64_t entry = group * basis.group_size, entries = basis.d - entry, vectors = basis.r - vector;
  Int4 at = basis;
  at.packed += vector * basis.width() + entry / 2;
  at.scale += vector * basis.groups() + group;
  at.offset += vector * basis.groups() + group;
  return {at, entry, vector, entries < basis.group_size ? int(entries) : basis.group_size,
          vectors < kVectors ? int(vectors) : kVectors};
}

// How a tile of 32 vectors is shared: a thread owns every step-th of them, and every parts-th piece of their entries.
template <class Block>
struct Int4Tile {
  static constexpr int step = Block::threads < kVectors ? Block::threads : kVectors;
  static constexpr int wide = kVectors / step, parts = Block::threads / step;
  int first, part, owned;
  LR_HD Int4Tile(const Block& block, int vectors) : first(block.tid % kVectors), part(block.tid / kVectors) {
    const int mine = vectors > first ? (vectors - 1 - first) / step + 1 : 0;
    owned = mine < wide ? mine : wide;
  }
};

// One group of `entries` of `vectors` <= 32 neighbouring columns of basis, `stride` from row to row. out.packed, scale and
// offset point to the group of the first of them.
template <class Block, class B>
LR_HD void quantize_int4_group(const Block& block, const B* basis, int64_t stride, const Int4& out, int entries, int vectors) {
  using Tile = Int4Tile<Block>;
  const Tile tile(block, vectors);
  float low[Tile::wide], high[Tile::wide];
  for (int j = 0; j < Tile::wide; ++j) low[j] = bits_float(0x7f800000u), high[j] = -low[j];
  LR_UNROLL(8)
  for (int i = tile.part; i < entries; i += Tile::parts) {
    const B* row = basis + i * stride + tile.first;
    LR_SIMD
    for (int j = 0; j < tile.owned; ++j) {
      const float x = to_float(row[j * Tile::step]);
      low[j] = least(low[j], x);
      high[j] = greatest(high[j], x);
    }
  }
  if constexpr (Tile::parts > 1) {
    static_assert(Tile::wide == 1);
    block.lanes[block.tid] = low[0];
    block.sync();
    for (int p = 0; p < Tile::parts; ++p) low[0] = least(low[0], block.lanes[p * kVectors + tile.first]);
    block.sync();
    block.lanes[block.tid] = high[0];
    block.sync();
    for (int p = 0; p < Tile::parts; ++p) high[0] = greatest(high[0], block.lanes[p * kVectors + tile.first]);
    block.sync();
  }
  Int4Group group[Tile::wide];
  for (int j = 0; j < tile.owned; ++j) {
    group[j] = int4_group(low[j], high[j]);
    if (tile.part != 0) continue;
    out.scale[(tile.first + j * Tile::step) * out.groups()] = group[j].scale;
    out.offset[(tile.first + j * Tile::step) * out.groups()] = group[j].offset;
  }
  for (int o = tile.part; 8 * o < entries; o += Tile::parts) {
    const int count = entries - 8 * o < 8 ? entries - 8 * o : 8;
    uint32_t words[Tile::wide] = {};
    LR_UNROLL(8)
    for (int e = 0; e < 8; ++e) {
      if (e >= count) break;
      const B* row = basis + (8 * o + e) * stride + tile.first;
      LR_SIMD
      for (int j = 0; j < tile.owned; ++j) words[j] |= int4_code(to_float(row[j * Tile::step]), group[j]) << 4 * e;
    }
    for (int j = 0; j < tile.owned; ++j) {
      uint8_t* to = out.packed + (tile.first + j * Tile::step) * out.width() + 4 * o;
      if (count == 8 && uintptr_t(to) % 4 == 0) {
        *reinterpret_cast<uint32_t*>(to) = words[j];
      } else {
        for (int b = 0; 2 * b < count; ++b) to[b] = uint8_t(words[j] >> 8 * b);
      }
    }
  }
}

// The inverse: the same group and vectors to fp32 rows, `stride` apart.
template <class Block>
LR_HD void dequantize_int4_group(const Block& block, const Int4& from, float* basis, int64_t stride, int entries, int vectors) {
  using Tile = Int4Tile<Block>;
  const Tile tile(block, vectors);
  float scale[Tile::wide], offset[Tile::wide];
  for (int j = 0; j < tile.owned; ++j) {
    scale[j] = from.scale[(tile.first + j * Tile::step) * from.groups()];
    offset[j] = from.offset[(tile.first + j * Tile::step) * from.groups()];
  }
  for (int o = tile.part; 8 * o < entries; o += Tile::parts) {
    const int count = entries - 8 * o < 8 ? entries - 8 * o : 8;
    uint32_t words[Tile::wide];
    for (int j = 0; j < tile.owned; ++j) {
      const uint8_t* at = from.packed + (tile.first + j * Tile::step) * from.width() + 4 * o;
      words[j] = 0;
      if (count == 8 && uintptr_t(at) % 4 == 0) {
        words[j] = *reinterpret_cast<const uint32_t*>(at);
      } else {
        for (int b = 0; 2 * b < count; ++b) words[j] |= uint32_t(at[b]) << 8 * b;
      }
    }
    LR_UNROLL(8)
    for (int e = 0; e < 8; ++e) {
      if (e >= count) break;
      float* row = basis + (8 * o + e) * stride + tile.first;
      LR_SIMD
      for (int j = 0; j < tile.owned; ++j) row[j * Tile::step] = int4_value(words[j] >> 4 * e & 15, scale[j], offset[j]);
    }
  }
}

LR_END
