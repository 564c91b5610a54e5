// Tiles of weights in codes, and updates into an INT8 one.
#pragma once

#include "../../cpu/int8.h"
#include "tensors.h"

namespace lowrank {

// Elements of a weight that are in fp32 at once during a product, 4 MiB: half as many make the products a tenth slower.
constexpr int64_t kPanelElements = kTileElements;

// Calls f(begin, end) on the groups of a tile.
template <class M, class F>
void parallel_groups(const M& w, const CodedTile& tile, const F& f) {
  parallel(tile.rows * ((tile.columns + w.group_size - 1) / w.group_size), w.group_size, f);
}

// The tile <- decay * tile + alpha * dense, rounded stochastically; every thread may take any group.
void update_int8_tile(const Int8Matrix& w, const CodedTile& tile, const Matrix& dense, const Int8Step& step);

// The same with c o dense as the update: one c a row of the tile, or else a column (the other is null). NaN leaves out a channel.
void update_int8_scaled(const Int8Matrix& w, const CodedTile& tile, const Matrix& dense, const float* by_row,
                        const float* by_column, const Int8Step& step);

}  // namespace lowrank
