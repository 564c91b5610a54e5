#include "apply.h"

#include "../../cpu/residual.h"

namespace lowrank {
namespace {

// The coefficients of a tile that begins at (i, j): one a row, or else a column.
struct Coefficients {
  const float *by_row, *by_column;
  Coefficients(const Update& u, int64_t i, int64_t j)
      : by_row(u.left ? nullptr : u.coefficients + i), by_column(u.left ? u.coefficients + j : nullptr) {}
};

Matrix gradient_from(const Update& u, int64_t i, int64_t j) {
  const Tensor& g = *u.gradient;
  return {storage(g), data<char>(g) + (i * g.size(1) + j) * int64_t(g.element_size()), g.size(1)};
}

// w <- decay w + alpha (back + c o phi) for the tile that begins at (i, j); `back` may be null.
void move_tile(const Matrix& w, const float* back, const Update& u, int64_t i, int64_t j, int64_t rows, int64_t columns,
               float decay, float alpha, const Rounding& rounding, Workspace& work) {
  const float* inside = nullptr;
  if (u.inside != nullptr) {
    const Tensor within = work.inside.matrix(rows, columns);
    back_project_tile(within, i, j, *u.inside, *u.basis, u.left, 0.0, 1.0, work);
    inside = data<float>(within);
  }
  const Coefficients c(u, i, j);
  const Move a{w, gradient_from(u, i, j), back, inside, c.by_row, c.by_column, columns, decay, alpha, rounding};
  parallel(rows, columns, [&](int64_t begin, int64_t end) { residual_kernels().move(a, begin, end); });
}

Tensor back_tile(const Update& u, int64_t i, int64_t j, int64_t rows, int64_t columns, Workspace& work) {
  const Tensor back = work.tile.matrix(rows, columns);
  back_project_tile(back, i, j, *u.x, *u.basis, u.left, 0.0, 1.0, work);
  return back;
}

// Calls f(row, column, rows, columns) on tiles that end with a group of their rows.
template <class F>
void for_int8_tiles(int64_t m, int64_t n, const F& f) {
  const int64_t high = std::min(m, kTileSide), wide = std::max<int64_t>(1, kTileElements / std::max<int64_t>(1, high));
  const int64_t whole = wide / kLargestGroup * kLargestGroup;
  for (int64_t j = 0; j < n; j += whole)
    for (int64_t i = 0; i < m; i += high) f(i, j, std::min(high, m - i), std::min(whole, n - j));
}

}  // namespace

void apply_into(const Tensor& param, const Update& u, const Rounding& rounding, Workspace& work) {
  if (u.gradient == nullptr) {
    back_project_into(param, *u.x, *u.basis, u.left, u.decay, u.alpha, u.ok, work, rounding);
    return;
  }
  const int64_t m = param.size(0), n = param.size(1);
  const auto weights = [&](int64_t i, int64_t j) {
    return Matrix{storage(param), data<char>(param) + (i * n + j) * int64_t(param.element_size()), n};
  };
  if (u.x == nullptr) {
    move_tile(weights(0, 0), nullptr, u, 0, 0, m, n, u.decay, u.alpha, rounding, work);
    return;
  }
  for_tiles(m, n, [&](int64_t i, int64_t j, int64_t rows, int64_t columns) {
    const Tensor back = back_tile(u, i, j, rows, columns, work);
    move_tile(weights(i, j), data<float>(back), u, i, j, rows, columns, u.decay, u.alpha, rounding.at(i * n + j), work);
  });
}

void apply_int8_into(const Int8Matrix& w, int64_t m, const Update& u, const RandomStream& stream, uint64_t offset,
                     Workspace& work) {
  const int64_t n = w.columns;
  const Int8Step step{{u.alpha, u.decay}, stream, offset};
  if (m == 0 || n == 0) return;
  if (u.x == nullptr) {
    const Coefficients c(u, 0, 0);
    update_int8_scaled(w, {0, 0, m, n}, gradient_from(u, 0, 0), c.by_row, c.by_column, step);
    return;
  }
  for_int8_tiles(m, n, [&](int64_t i, int64_t j, int64_t rows, int64_t columns) {
    const Tensor back = back_tile(u, i, j, rows, columns, work);
    const Matrix update{DType::f32, data<float>(back), columns};
    // The tile becomes back + c o phi, and stays NaN where a channel is left out.
    if (u.gradient != nullptr) move_tile(update, data<float>(back), u, i, j, rows, columns, 0.0f, 1.0f, {}, work);
    update_int8_tile(w, {i, j, rows, columns}, update, step);
  });
}

}  // namespace lowrank
