#include "int8_products.h"

namespace lowrank {
namespace {

// Calls f(begin, end) on the groups of a tile.
template <class F>
void parallel_groups(const Int8Matrix& w, const Int8Tile& tile, const F& f) {
  parallel(tile.rows * ((tile.columns + w.group_size - 1) / w.group_size), w.group_size, f);
}

}  // namespace

void dequantize_int8_tile(const Int8Matrix& w, const Int8Tile& tile, const Matrix& dense) {
  parallel_groups(w, tile, [&](int64_t begin, int64_t end) { int8_kernels().dequantize(w, dense, tile, begin, end); });
}

void update_int8_tile(const Int8Matrix& w, const Int8Tile& tile, const Matrix& dense, const Int8Step& step) {
  parallel_groups(w, tile, [&](int64_t begin, int64_t end) { int8_kernels().update(w, dense, tile, step, begin, end); });
}

void update_int8_scaled(const Int8Matrix& w, const Int8Tile& tile, const Matrix& dense, const float* by_row, const float* by_column,
                        const Int8Step& step) {
  parallel_groups(w, tile, [&](int64_t begin, int64_t end) {
    int8_kernels().update_scaled(w, dense, by_row, by_column, tile, step, begin, end);
  });
}

}  // namespace lowrank
