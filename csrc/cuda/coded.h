// Launchers for weights in codes, of each kind M of Coded: enqueue on a stream, never wait.
#pragma once

#include "../core/coded.h"
#include "launch.h"

namespace lowrank {

// w <- dense (rows, w.columns)
template <class M>
cudaError_t launch_quantize(DType dtype, const void* dense, const M& w, int64_t rows, cudaStream_t stream);
// dense <- w
template <class M>
cudaError_t launch_dequantize(DType dtype, const M& w, void* dense, int64_t rows, cudaStream_t stream);

}  // namespace lowrank
