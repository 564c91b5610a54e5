// A product's tile is made of words: four neighbours of the depth, a byte each. Codes of rows are signed and lie channel by
// channel; codes of columns have 128 added, as the processor's dot product wants it, and lie word by word for a block of
// channels. Their 128 is taken off again through the sum of the row's codes.
#include "int8_gemm.h"

#include <algorithm>

#include "../core/int8_gemm.h"
#include "../core/store.h"
#include "buffer.h"
#include "lanes.h"
#include "philox.h"

namespace lowrank {
inline namespace LR_ISA {
namespace {

constexpr int kTileRows = 4, kTileVectors = Lanes::tile_vectors, kTileColumns = Lanes::count * kTileVectors;
constexpr uint32_t kOffset = 0x80808080u;

// Where the codes, scales and sums of some channels and one group go.
struct Part {
  uint8_t* codes;
  float* scale;
  int32_t* sum;
  int64_t width;
};

Part part_of(const Int8Operand& to, int64_t group, int64_t channel) {
  const int64_t at = group * to.padded() + channel;
  return {to.codes + at * to.width(), to.scale + at, to.sum == nullptr ? nullptr : to.sum + at, to.width()};
}

// Word `word` of channel `channel` of a part.
uint8_t* word_of(const Part& to, int64_t channel, int64_t word) {
  if (to.sum != nullptr) return to.codes + channel * to.width + word * 4;
  return to.codes + channel / kTileColumns * kTileColumns * to.width + (word * kTileColumns + channel % kTileColumns) * 4;
}

// Channels are columns: `wide` of them from x on, whose rows are `stride` apart; whole blocks are written. `stage` holds 256
// rows of whole blocks.
template <class T>
void quantize_columns(const T* x, int64_t stride, int64_t wide, int64_t deep, const Part& to, float* stage) {
  const int64_t padded = (wide + kInt8Block - 1) / kInt8Block * kInt8Block, words = (deep + 3) / 4;
  auto* top = reinterpret_cast<uint32_t*>(to.scale);
  std::fill_n(top, padded, 0u);
  for (int64_t k = 0; k < deep; ++k) {
    float* row = stage + k * padded;
    const T* from = x + k * stride;
    LR_SIMD
    for (int64_t c = 0; c < wide; ++c) {
      const float value = to_float(from[c]);
      const uint32_t size = magnitude(value);
      top[c] = top[c] > size ? top[c] : size;
      row[c] = value;
    }
    std::fill_n(row + wide, padded - wide, 0.0f);
  }
  std::fill_n(stage + deep * padded, (words * 4 - deep) * padded, 0.0f);
  for (int64_t first = 0; first < padded; first += kTileColumns) {
    alignas(64) float inverse[kTileColumns];
    alignas(64) uint32_t packed[kTileColumns];
    for (int c = 0; c < kTileColumns; ++c) {
      to.scale[first + c] = gemm_scale(top[first + c]);
      inverse[c] = int8_inverse(to.scale[first + c]);
    }
    for (int64_t word = 0; word < words; ++word) {
      const float* row = stage + word * 4 * padded + first;
      LR_SIMD
      for (int c = 0; c < kTileColumns; ++c) {
        uint32_t codes = 0;
        for (int e = 0; e < 4; ++e) codes |= (gemm_code(row[e * padded + c], inverse[c]) & 0xffu) << (8 * e);
        packed[c] = codes;
      }
      if (to.sum == nullptr) {
        auto* out = reinterpret_cast<uint32_t*>(word_of(to, first, word));
        LR_SIMD
        for (int c = 0; c < kTileColumns; ++c) out[c] = packed[c] ^ kOffset;
      } else {
        for (int c = 0; c < kTileColumns; ++c) memcpy(word_of(to, first + c, word), packed + c, 4);
      }
    }
  }
}

// Channels are rows: `high` of them, `stride` apart, up to `padded` with zeros.
template <class T>
void quantize_rows(const T* x, int64_t stride, int64_t high, int64_t padded, int64_t deep, const Part& to) {
  alignas(64) uint8_t codes[kGemmGroup + 4];
  const int64_t words = (deep + 3) / 4;
  for (int64_t c = 0; c < padded; ++c) {
    const T* from = x + c * stride;
    const int64_t n = c < high ? deep : 0;
    uint32_t top = 0;
    LR_SIMD_MAX(top)
    for (int64_t k = 0; k < n; ++k) {
      const uint32_t size = magnitude(to_float(from[k]));
      top = top > size ? top : size;
    }
    to.scale[c] = gemm_scale(top);
    const float inverse = int8_inverse(to.scale[c]);
    uint8_t* out = to.sum == nullptr ? codes : word_of(to, c, 0);
    LR_SIMD
    for (int64_t k = 0; k < n; ++k) out[k] = uint8_t(gemm_code(to_float(from[k]), inverse));
    std::fill_n(out + n, words * 4 - n, uint8_t(0));
    for (int64_t word = 0; to.sum == nullptr && word < words; ++word) {
      uint32_t packed;
      memcpy(&packed, codes + word * 4, 4);
      packed ^= kOffset;
      memcpy(word_of(to, c, word), &packed, 4);
    }
  }
}

// Sums of the codes of `channels` rows.
void sum_codes(const Part& to, int64_t channels, int64_t deep) {
  for (int64_t c = 0; c < channels; ++c) {
    const auto* codes = reinterpret_cast<const int8_t*>(word_of(to, c, 0));
    int32_t sum = 0;
    LR_SIMD_SUM(sum)
    for (int64_t k = 0; k < deep; ++k) sum += codes[k];
    to.sum[c] = sum;
  }
}

// Channels [channel, channel + count) of one group, filled up to whole blocks if they are columns of the product, else to
// whole tiles.
void quantize_part(const Int8Source& from, int64_t channel, int64_t count, int64_t group, const Part& to, float* stage) {
  const int64_t k = group * kGemmGroup, deep = smaller(kGemmGroup, from.depth - k);
  const int64_t unit = to.sum == nullptr || from.columns ? kInt8Block : kTileRows;
  const int64_t padded = (count + unit - 1) / unit * unit;
  dispatch(from.matrix.dtype, [&](auto type) {
    const auto* x = static_cast<const typename decltype(type)::type*>(from.matrix.data);
    const int64_t stride = from.matrix.stride;
    if (from.columns) {
      quantize_columns(x + k * stride + channel, stride, count, deep, to, stage);
    } else {
      quantize_rows(x + channel * stride + k, stride, count, padded, deep, to);
    }
  });
  if (to.sum != nullptr) sum_codes(to, padded, deep);
}

// sums (kTileRows, kTileColumns), `stride` apart, of one group: (scale_a scale_b) dot is stored if FIRST, else added.
template <bool FIRST>
void tile(const Part& a, int64_t row, const Part& b, int64_t column, int64_t words, float* sums, int64_t stride) {
  Lanes dots[kTileRows][kTileVectors];
  const uint8_t *codes_a = word_of(a, row, 0), *codes_b = word_of(b, column, 0);
  LR_UNROLL_ALL
  for (int i = 0; i < kTileRows; ++i) {
    LR_UNROLL_ALL
    for (int v = 0; v < kTileVectors; ++v) dots[i][v] = Lanes::all(-128 * a.sum[row + i]);
  }
  for (int64_t word = 0; word < words; ++word) {
    Lanes columns[kTileVectors];
    LR_UNROLL_ALL
    for (int v = 0; v < kTileVectors; ++v) columns[v] = Lanes::load(codes_b + (word * kTileColumns + v * Lanes::count) * 4);
    LR_UNROLL_ALL
    for (int i = 0; i < kTileRows; ++i) {
      const Lanes codes = Lanes::all_words(codes_a + i * a.width + word * 4);
      LR_UNROLL_ALL
      for (int v = 0; v < kTileVectors; ++v) dots[i][v].add_products(columns[v], codes);
    }
  }
  LR_UNROLL_ALL
  for (int i = 0; i < kTileRows; ++i) {
    LR_UNROLL_ALL
    for (int v = 0; v < kTileVectors; ++v)
      dots[i][v].template add_scaled<FIRST>(sums + i * stride + v * Lanes::count, a.scale[row + i],
                                            b.scale + column + v * Lanes::count);
  }
}

// Rows [0, rows) x columns [0, columns) of one group; whole tiles are written.
void add_group(const Part& a, int64_t rows, const Part& b, int64_t columns, int64_t deep, bool first, float* sums, int64_t stride) {
  const int64_t words = (deep + 3) / 4;
  for (int64_t j = 0; j < columns; j += kTileColumns) {
    for (int64_t i = 0; i < rows; i += kTileRows) {
      float* at = sums + i * stride + j;
      first ? tile<true>(a, i, b, j, words, at, stride) : tile<false>(a, i, b, j, words, at, stride);
    }
  }
}

int64_t depth_of(int64_t depth, int64_t group) { return smaller(kGemmGroup, depth - group * kGemmGroup); }

void run_quantize(const Int8Source& from, const Int8Operand& to, int64_t begin, int64_t end) {
  const Buffer stage(kGemmGroup * kInt8Block * int64_t(sizeof(float)));
  for (int64_t i = begin; i < end; ++i) {
    const int64_t group = i / to.blocks(), channel = i % to.blocks() * kInt8Block;
    quantize_part(from, channel, smaller(kInt8Block, to.channels - channel), group, part_of(to, group, channel), stage.as<float>());
  }
}

void run_project_columns(const Int8Operand& rows, const Int8Source& from, float* out, int64_t begin, int64_t end) {
  // As wide as the sums stay in a share of the second cache: rows of the source are then read in long pieces.
  const int64_t high = (rows.channels + kTileRows - 1) / kTileRows * kTileRows, most = (int64_t(1) << 16) / high;
  const int64_t wide = std::clamp(most / kInt8Block, int64_t(1), smaller(8, end - begin)) * kInt8Block;
  const int64_t width = rows.width();
  const Buffer stage(kGemmGroup * wide * 4), codes(width * wide), scale(wide * 4), sums(high * wide * 4);
  const Part panel{codes.as<uint8_t>(), scale.as<float>(), nullptr, width};
  const int64_t last = smaller(end * kInt8Block, from.channels);
  for (int64_t column = begin * kInt8Block; column < last; column += wide) {
    const int64_t columns = smaller(wide, last - column);
    for (int64_t group = 0; group < rows.groups(); ++group) {
      quantize_part(from, column, columns, group, panel, stage.as<float>());
      add_group(part_of(rows, group, 0), rows.channels, panel, columns, depth_of(rows.depth, group), group == 0, sums.as<float>(),
                wide);
    }
    for (int64_t i = 0; i < rows.channels; ++i) std::copy_n(sums.as<float>() + i * wide, columns, out + i * from.channels + column);
  }
}

void run_project_rows(const Int8Source& from, const Int8Operand& columns, float* out, int64_t begin, int64_t end) {
  const int64_t width = columns.width(), wide = columns.padded();
  const Buffer codes(width * kInt8Rows), scale(kInt8Rows * 4), sum(kInt8Rows * 4), sums(kInt8Rows * wide * 4);
  const Part panel{codes.as<uint8_t>(), scale.as<float>(), sum.as<int32_t>(), width};
  for (int64_t row = begin * kInt8Rows; row < smaller(end * kInt8Rows, from.channels); row += kInt8Rows) {
    const int64_t rows = smaller(kInt8Rows, from.channels - row);
    for (int64_t group = 0; group < columns.groups(); ++group) {
      quantize_part(from, row, rows, group, panel, nullptr);
      add_group(panel, rows, part_of(columns, group, 0), columns.channels, depth_of(columns.depth, group), group == 0,
                sums.as<float>(), wide);
    }
    for (int64_t i = 0; i < rows; ++i)
      std::copy_n(sums.as<float>() + i * wide, columns.channels, out + (row + i) * columns.channels);
  }
}

void run_back(const Int8Back& b, int64_t begin, int64_t end) {
  constexpr int64_t wide = 4 * kInt8Block;
  const Buffer sums(kInt8Rows * wide * 4);
  const int64_t m = b.rows.channels, n = b.columns.channels;
  dispatch(b.w.dtype, [&](auto type) {
    using W = typename decltype(type)::type;
    with_rounding<W>(b.rounding, wide, [&](const auto& rounding) {
      for (int64_t row = begin * kInt8Rows; row < smaller(end * kInt8Rows, m); row += kInt8Rows) {
        const int64_t rows = smaller(kInt8Rows, m - row);
        for (int64_t column = 0; column < n; column += wide) {
          const int64_t columns = smaller(wide, n - column);
          for (int64_t group = 0; group < b.rows.groups(); ++group)
            add_group(part_of(b.rows, group, row), rows, part_of(b.columns, group, column), columns, depth_of(b.rows.depth, group),
                      group == 0, sums.as<float>(), wide);
          for (int64_t i = 0; i < rows; ++i) {
            if (b.ok_rows != nullptr && !b.ok_rows[row + i]) continue;
            const int64_t at = (row + i) * b.w.stride + column;
            apply_row(OneThread{nullptr}, static_cast<W*>(b.w.data) + at, sums.as<float>() + i * wide,
                      b.ok_columns == nullptr ? nullptr : b.ok_columns + column, columns, b.decay, b.alpha,
                      rounding.run(at, columns));
          }
        }
      }
    });
  });
}

}  // namespace

extern const Int8GemmKernels int8_gemm_table;
const Int8GemmKernels int8_gemm_table = {run_quantize, run_project_columns, run_project_rows, run_back};

}  // namespace LR_ISA
}  // namespace lowrank
