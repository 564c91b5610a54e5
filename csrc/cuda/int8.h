// Launcher of the update of INT8 weights: enqueues on a stream, never waits.
#pragma once

#include "../core/int8.h"
#include "coded.h"

namespace lowrank {

// The numbers of an update, and where its random bits come from.
struct Int8Scalars {
  Number alpha, decay, step;
  uint64_t seed, offset;
  uint32_t parameter;
};

// w <- decay * w + alpha * dense, rounded stochastically
cudaError_t launch_update_int8(DType dtype, const Int8Matrix& w, const void* dense, const Int8Scalars& scalars, int64_t rows,
                               cudaStream_t stream);

}  // namespace lowrank
