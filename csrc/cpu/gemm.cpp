// A tile of 8 x 48 sums stays in 24 registers while its depth passes: each number of its left operand is broadcast to three
// vectors of its right one, which lies packed in panels of 48 columns. While a tile multiplies, it asks memory for lines of
// what comes next.
#include "gemm.h"

#include <algorithm>

#include "buffer.h"
#include "float_lanes.h"

namespace lowrank {
inline namespace LR_ISA {
namespace {

constexpr int kTileRows = int(kGemmRows), kTileVectors = 3, kTileColumns = kTileVectors * FloatLanes::count;
constexpr int kPace = 4;  // steps of the depth for each line that is asked for

int64_t padded(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// A part of a matrix on its way to the second cache, line by line.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const float* first, int64_t stride, int64_t rows, int64_t columns)
      : row_(reinterpret_cast<const char*>(first)), stride_(stride * 4), bytes_(columns * 4), rows_(columns > 0 ? rows : 0) {}
  void next() {
    if (rows_ == 0) return;
    __builtin_prefetch(row_ + at_, 0, 2);
    at_ += 64;
    if (at_ < bytes_) return;
    at_ = 0;
    row_ += stride_;
    --rows_;
  }

 private:
  const char* row_ = nullptr;
  int64_t stride_ = 0, bytes_ = 0, rows_ = 0, at_ = 0;
};

// The left operand of a tile: rows ROW numbers apart, steps of the depth STEP apart.
template <int64_t ROW, int64_t STEP>
struct Left {
  const float* at;
};
using Staged = Left<kGemmDepth, 1>;
using Interleaved = Left<1, kTileRows>;

// The right operand: a panel, or a matrix that is copied into `panel` on its way.
struct Right {
  float* panel;
  const float* from;
  int64_t stride;
};

// Where a tile of `columns` sums a row goes; it is stored if `first`, else added.
struct Sums {
  float* at;
  int64_t stride, rows, columns;
  bool first;
};

template <int V, bool COPY, int64_t ROW, int64_t STEP>
void tile(Left<ROW, STEP> a, Right b, int64_t depth, const Sums& out, Ahead& ahead) {
  FloatLanes sums[kTileRows][V];
  const int last = int(out.columns) - (V - 1) * FloatLanes::count;
  LR_UNROLL_ALL
  for (int i = 0; i < kTileRows; ++i) {
    LR_UNROLL_ALL
    for (int v = 0; v < V; ++v) sums[i][v] = FloatLanes::all(0.0f);
  }
  const auto step = [&](int64_t k) __attribute__((always_inline)) {
    FloatLanes columns[V];
    LR_UNROLL_ALL
    for (int v = 0; v < V; ++v) {
      float* packed = b.panel + k * kTileColumns + v * FloatLanes::count;
      if constexpr (COPY) {
        const float* from = b.from + k * b.stride + v * FloatLanes::count;
        columns[v] = v < V - 1 ? FloatLanes::load(from) : FloatLanes::load(from, last);
        columns[v].store(packed);
      } else {
        columns[v] = FloatLanes::load(packed);
      }
    }
    LR_UNROLL_ALL
    for (int i = 0; i < kTileRows; ++i) {
      const FloatLanes x = FloatLanes::all(a.at[i * ROW + k * STEP]);
      LR_UNROLL_ALL
      for (int v = 0; v < V; ++v) sums[i][v].add_product(x, columns[v]);
    }
  };
  int64_t k = 0;
  for (; k + kPace <= depth; k += kPace) {
    ahead.next();
    LR_UNROLL_ALL
    for (int e = 0; e < kPace; ++e) step(k + e);
  }
  for (; k < depth; ++k) step(k);
  // Unrolled whole: an index that is not constant would put the sums into memory.
  LR_UNROLL_ALL
  for (int i = 0; i < kTileRows; ++i) {
    if (i >= out.rows) break;
    LR_UNROLL_ALL
    for (int v = 0; v < V; ++v) {
      float* to = out.at + i * out.stride + v * FloatLanes::count;
      const int count = v < V - 1 ? FloatLanes::count : last;
      if (!out.first) sums[i][v].add(FloatLanes::load(to, count));
      sums[i][v].store(to, count);
    }
  }
}

template <bool COPY, class A>
void any_tile(A a, Right b, int64_t depth, const Sums& out, Ahead& ahead) {
  if (out.columns > 2 * FloatLanes::count) {
    tile<3, COPY>(a, b, depth, out, ahead);
  } else if (out.columns > FloatLanes::count) {
    tile<2, COPY>(a, b, depth, out, ahead);
  } else {
    tile<1, COPY>(a, b, depth, out, ahead);
  }
}

// Panels of b (depth, columns), each of all the depth.
void pack(const float* b, int64_t stride, int64_t depth, int64_t columns, float* to) {
  for (int64_t j = 0; j < columns; j += kTileColumns) {
    const int64_t wide = smaller(kTileColumns, columns - j);
    for (int64_t k = 0; k < depth; ++k, to += kTileColumns) {
      std::copy_n(b + k * stride + j, wide, to);
      std::fill_n(to + wide, kTileColumns - wide, 0.0f);
    }
  }
}

// aᵀ of a (depth, rows), interleaved for tiles.
void interleave(const float* a, int64_t stride, int64_t depth, int64_t rows, float* to) {
  for (int64_t i = 0; i < rows; i += kTileRows) {
    const int64_t high = smaller(kTileRows, rows - i);
    for (int64_t k = 0; k < depth; ++k, to += kTileRows) {
      std::copy_n(a + k * stride + i, high, to);
      std::fill_n(to + high, kTileRows - high, 0.0f);
    }
  }
}

// Rows of a for a tile: as they lie in their matrix they would fall on the same few lines of the first cache.
Staged staged(const float* a, int64_t stride, int64_t rows, int64_t depth, float* stage) {
  for (int64_t i = 0; i < rows; ++i) std::copy_n(a + i * stride, depth, stage + i * kGemmDepth);
  return {stage};
}

void project_rows(const Projection& p, int64_t begin, int64_t end) {
  // As many rows as their sums stay in the second cache.
  const float* g = p.grad;
  const int64_t r = p.rank, stride = p.columns, most = std::max(kGemmRows, (int64_t(1) << 17) / r / kGemmRows * kGemmRows);
  const Buffer panels(kGemmDepth * padded(r, kTileColumns) * 4), stage(kTileRows * kGemmDepth * 4);
  std::fill_n(stage.as<float>(), kTileRows * kGemmDepth, 0.0f);
  for (int64_t top = begin; top < end; top += most) {
    const int64_t bottom = smaller(end, top + most);
    for (int64_t k = 0; k < p.columns; k += kGemmDepth) {
      const int64_t depth = smaller(kGemmDepth, p.columns - k);
      pack(p.basis + k * r, r, depth, r, panels.as<float>());
      for (int64_t i = top; i < bottom; i += kTileRows) {
        const int64_t rows = smaller(kTileRows, bottom - i), next = i + kTileRows;
        const Staged a = staged(g + i * stride + k, stride, rows, depth, stage.as<float>());
        Ahead ahead = next < bottom ? Ahead(g + next * stride + k, stride, smaller(kTileRows, bottom - next), depth)
                                    : Ahead(g + top * stride + k + depth, stride, smaller(kTileRows, bottom - top),
                                            smaller(kGemmDepth, p.columns - k - depth));
        for (int64_t j = 0; j < r; j += kTileColumns)
          any_tile<false>(a, {panels.as<float>() + j * depth, nullptr, 0}, depth,
                          {p.out + i * r + j, r, rows, smaller(kTileColumns, r - j), k == 0}, ahead);
      }
    }
  }
}

void project_columns(const Projection& p, int64_t begin, int64_t end) {
  // Sums lie tile by tile: in `out` the rows of a tile would fall on the same few lines of the first cache.
  const float* g = p.grad;
  const int64_t r = p.rank, stride = p.columns, high = padded(r, kTileRows);
  const int64_t most = std::max<int64_t>(1, (int64_t(1) << 18) / (high * kTileColumns)) * kTileColumns;
  const int64_t wide = smaller(most, padded(end - begin, kTileColumns));
  const Buffer rows(kGemmColumnDepth * high * 4), panel(kGemmColumnDepth * kTileColumns * 4), sums(high * wide * 4);
  float* packed = panel.as<float>();
  for (int64_t side = begin; side < end; side += wide) {
    const int64_t last = smaller(end, side + wide);
    for (int64_t k = 0; k < p.rows; k += kGemmColumnDepth) {
      const int64_t depth = smaller(kGemmColumnDepth, p.rows - k);
      interleave(p.basis + k * r, r, depth, r, rows.as<float>());
      for (int64_t j = side; j < last; j += kTileColumns) {
        const int64_t columns = smaller(kTileColumns, last - j), next = j + kTileColumns;
        const float* from = g + k * stride + j;
        Ahead ahead = next < last ? Ahead(from + kTileColumns, stride, depth, smaller(kTileColumns, last - next))
                                  : Ahead(g + (k + depth) * stride + side, stride, smaller(kGemmColumnDepth, p.rows - k - depth),
                                          smaller(kTileColumns, last - side));
        const auto make = [&]<bool COPY>(int64_t i, const float* direct) {
          any_tile<COPY>(Interleaved{rows.as<float>() + i * depth}, {packed, direct, stride}, depth,
                         {sums.as<float>() + (j - side) * high + i * kTileColumns, kTileColumns, kTileRows, columns, k == 0},
                         ahead);
        };
        // The first tile packs the panel for the others.
        make.template operator()<true>(0, from);
        for (int64_t i = kTileRows; i < r; i += kTileRows) make.template operator()<false>(i, nullptr);
      }
    }
    for (int64_t i = 0; i < r; ++i) {
      for (int64_t j = side; j < last; j += kTileColumns)
        std::copy_n(sums.as<float>() + (j - side) * high + i * kTileColumns, smaller(kTileColumns, last - j),
                    p.out + i * p.columns + j);
    }
  }
}

}  // namespace

extern const GemmKernels gemm_table;
const GemmKernels gemm_table = {FloatLanes::fast, project_rows, project_columns};

}  // namespace LR_ISA
}  // namespace lowrank
