// Launchers of the NF4 kernels: enqueue on a stream, never wait.
#pragma once

#include "../core/nf4.h"
#include "launch.h"

namespace lowrank {

// w <- dense (rows, w.columns)
cudaError_t launch_quantize_nf4(DType dtype, const void* dense, const Nf4Matrix& w, int64_t rows, cudaStream_t stream);
// dense <- w
cudaError_t launch_dequantize_nf4(DType dtype, const Nf4Matrix& w, void* dense, int64_t rows, cudaStream_t stream);

}  // namespace lowrank
