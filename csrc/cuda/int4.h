// Launchers of the INT4 kernels: enqueue on a stream, never wait.
#pragma once

#include <cuda_runtime_api.h>

#include "../core/dtype.h"
#include "../core/int4.h"

namespace lowrank {

// basis (d, r), row-major.
cudaError_t launch_quantize_int4(DType dtype, const void* basis, const Int4& to, cudaStream_t stream);
cudaError_t launch_dequantize_int4(const Int4& from, float* basis, cudaStream_t stream);

}  // namespace lowrank
