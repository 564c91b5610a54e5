// The two products of a step, for any storage.
#pragma once

#include <variant>

#include "int4_products.h"

namespace lowrank {

// What a step reuses from matrix to matrix. `basis` holds a 16-bit one in fp32, or a panel of one that is made as it is read.
struct Workspace {
  Scratch low_rank, update, basis, tile, inside;
};

// A basis in memory: a matrix in fp32, or INT4.
using Basis = std::variant<Tensor, Int4>;

// param <- beta * param + alpha * back where ok, which has a flag a channel (null: everywhere). `make(update, i, j)` fills an
// fp32 tile with the part of back that begins at (i, j).
template <class F>
void apply_tiles(const Tensor& param, bool left, double beta, double alpha, const uint8_t* ok, const Rounding& rounding,
                 Scratch& scratch, const F& make) {
  const int64_t n = param.size(1);
  for_tiles(param.size(0), n, [&](int64_t i, int64_t j, int64_t rows, int64_t columns) {
    const Tensor update = scratch.matrix(rows, columns);
    make(update, i, j);
    const Matrix w{storage(param), data<char>(param) + (i * n + j) * int64_t(param.element_size()), n};
    const uint8_t *ok_rows = ok && !left ? ok + i : nullptr, *ok_columns = ok && left ? ok + j : nullptr;
    const float* delta = data<float>(update);
    parallel(rows, columns, [&](int64_t begin, int64_t end) {
      store_kernels().apply(w, delta, ok_rows, ok_columns, columns, float(beta), float(alpha), rounding.at(i * n + j), begin, end);
    });
  });
}

// r <- project(grad).
void project_into(const Tensor& r, const Tensor& grad, const Basis& basis, bool left, Workspace& work);

// w <- beta * w + alpha * (the part of back(x) that begins at (row, column) and has w's shape), in fp32; beta = 0 does not read
// w.
void back_project_tile(const Tensor& w, int64_t row, int64_t column, const Tensor& x, const Basis& basis, bool left, double beta,
                       double alpha, Workspace& work);

// param <- beta * param + alpha * back(x) where ok, which has a flag a channel (null: everywhere).
void back_project_into(const Tensor& param, const Tensor& x, const Basis& basis, bool left, double beta, double alpha,
                       const uint8_t* ok, Workspace& work, const Rounding& rounding = {});

}  // namespace lowrank
