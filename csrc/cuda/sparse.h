// Launchers of the structured sparse kernels.
#pragma once

#include "../core/adam.h"
#include "../core/philox.h"
#include "../core/sparse.h"
#include "launch.h"

namespace lowrank {

// Selects rows; the arrays of `selection` are on the device.
cudaError_t launch_select_rows(const RowSelection& selection, const RandomStream& stream, cudaStream_t cuda_stream);

// x (count, n) or (m, count) <- the selected rows (left) or columns of g (m, n).
cudaError_t launch_gather(DType dtype, const void* g, const SelectedRows& rows, float* x, int64_t m, int64_t n, bool left,
                          cudaStream_t stream);

// Fills owner (rows.size entries) for rows.indices; `owner` is rows.owner, writable.
cudaError_t launch_claim(const SelectedRows& rows, uint32_t* owner, cudaStream_t stream);

// w (m, n) <- w + alpha * scattered x; after launch_claim.
cudaError_t launch_scatter_add(DType dtype, void* w, const SelectedRows& rows, const float* x, int64_t m, int64_t n, float alpha,
                               bool left, cudaStream_t stream);

struct GrassArguments {
  void* w;
  const void* g;
  float *m, *v;
  int64_t rows, columns;  // of w
  SelectedRows selected;
  double beta1, beta2, eps, weight_decay, scale;
  Number step, lr;
  const float *grad_scale, *found_inf;  // may be null
  int64_t* skipped;                     // may be null
  uint8_t* ok;                          // left, with weight decay: a flag a column, at an address aligned to 8
  Rounding rounding;                    // whose step is read from `step`
};

// One Grass step of a matrix; after launch_claim.
cudaError_t launch_grass(DType w, DType g, const GrassArguments& arguments, bool left, cudaStream_t stream);

}  // namespace lowrank
