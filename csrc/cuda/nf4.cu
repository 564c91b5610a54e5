// NF4 weights.
#include "../core/nf4.h"
#include "coded.cuh"

namespace lowrank {

template cudaError_t launch_quantize(DType, const void*, const Nf4Matrix&, int64_t, cudaStream_t);
template cudaError_t launch_dequantize(DType, const Nf4Matrix&, void*, int64_t, cudaStream_t);

}  // namespace lowrank
