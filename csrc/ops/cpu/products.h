// The two products of a step, for any storage.
#pragma once

#include "tensors.h"

namespace lowrank {

// What a step reuses from matrix to matrix.
struct Workspace {
  Scratch low_rank, basis, tile;
};

// param <- beta * param + alpha * back where ok, which has a flag a channel (null: everywhere). `make(update, i, j)` fills an
// fp32 tile with the part of back that begins at (i, j).
template <class F>
void apply_tiles(const Tensor& param, bool left, double beta, double alpha, const uint8_t* ok, Scratch& scratch, const F& make) {
  const int64_t n = param.size(1);
  for_tiles(param.size(0), n, [&](int64_t i, int64_t j, int64_t rows, int64_t columns) {
    const Tensor update = scratch.matrix(rows, columns);
    make(update, i, j);
    const Matrix w{storage(param), data<char>(param) + (i * n + j) * int64_t(param.element_size()), n};
    const uint8_t *ok_rows = ok && !left ? ok + i : nullptr, *ok_columns = ok && left ? ok + j : nullptr;
    const float* delta = data<float>(update);
    parallel(rows, columns, [&](int64_t begin, int64_t end) {
      store_kernels().apply(w, delta, ok_rows, ok_columns, columns, float(beta), float(alpha), begin, end);
    });
  });
}

// r <- project(grad); basis in fp32.
void project_into(const Tensor& r, const Tensor& grad, const Tensor& basis, bool left, Scratch& scratch);

// param <- beta * param + alpha * back(x) where ok, which has a flag a channel (null: everywhere); basis in fp32.
void back_project_into(const Tensor& param, const Tensor& x, const Tensor& basis, bool left, double beta, double alpha,
                       const uint8_t* ok, Scratch& scratch);

}  // namespace lowrank
