#include "int8_products.h"

namespace lowrank {

void update_int8_tile(const Int8Matrix& w, const CodedTile& tile, const Matrix& dense, const Int8Step& step) {
  parallel_groups(w, tile, [&](int64_t begin, int64_t end) { int8_kernels().update(w, dense, tile, step, begin, end); });
}

void update_int8_scaled(const Int8Matrix& w, const CodedTile& tile, const Matrix& dense, const float* by_row,
                        const float* by_column, const Int8Step& step) {
  parallel_groups(w, tile, [&](int64_t begin, int64_t end) {
    int8_kernels().update_scaled(w, dense, by_row, by_column, tile, step, begin, end);
  });
}

}  // namespace lowrank
