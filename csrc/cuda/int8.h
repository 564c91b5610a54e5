// Launchers of the INT8 kernels: enqueue on a stream, never wait.
#pragma once

#include "../core/int8.h"
#include "launch.h"

namespace lowrank {

// The numbers of an update, and where its random bits come from.
struct Int8Scalars {
  Number alpha, decay, step;
  uint64_t seed, offset;
  uint32_t parameter;
};

// w <- dense (rows, w.columns)
cudaError_t launch_quantize_int8(DType dtype, const void* dense, const Int8Matrix& w, int64_t rows, cudaStream_t stream);
// dense <- w
cudaError_t launch_dequantize_int8(DType dtype, const Int8Matrix& w, void* dense, int64_t rows, cudaStream_t stream);
// w <- decay * w + alpha * dense, rounded stochastically
cudaError_t launch_update_int8(DType dtype, const Int8Matrix& w, const void* dense, const Int8Scalars& scalars, int64_t rows,
                               cudaStream_t stream);

}  // namespace lowrank
