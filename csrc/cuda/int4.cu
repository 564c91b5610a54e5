// INT4 bases: a thread block for one group of 32 vectors. The basis passes once, 32 neighbours at a time; its second read hits
// the cache.
#include "block.cuh"
#include "int4.h"

LR_BEGIN
namespace {

LR_HD Int4Piece piece_of(const Int4& basis, unsigned i) {
  return int4_piece(basis, i / basis.groups() * kVectors, i % basis.groups());
}

template <class B>
__global__ void __launch_bounds__(kLanes) quantize_int4(const B* basis, Int4 to) {
  __shared__ float lanes[kLanes];
  const Int4Piece p = piece_of(to, blockIdx.x);
  const GpuBlock<kLanes> block{int(threadIdx.x), lanes};
  quantize_int4_group(block, basis + p.entry * to.r + p.vector, to.r, p.at, p.entries, p.vectors);
}

__global__ void __launch_bounds__(kLanes) dequantize_int4(Int4 from, float* basis) {
  const Int4Piece p = piece_of(from, blockIdx.x);
  const GpuBlock<kLanes> block{int(threadIdx.x), nullptr};
  dequantize_int4_group(block, p.at, basis + p.entry * from.r + p.vector, from.r, p.entries, p.vectors);
}

unsigned pieces(const Int4& basis) { return unsigned(basis.groups() * ((basis.r + kVectors - 1) / kVectors)); }

}  // namespace
LR_END

namespace lowrank {

cudaError_t launch_quantize_int4(DType dtype, const void* data, const Int4& to, cudaStream_t stream) {
  if (to.d == 0) return cudaSuccess;
  return dispatch(dtype, [&](auto type) {
    const auto* basis = static_cast<const typename decltype(type)::type*>(data);
    quantize_int4<<<pieces(to), kLanes, 0, stream>>>(basis, to);
    return cudaGetLastError();
  });
}

cudaError_t launch_dequantize_int4(const Int4& from, float* basis, cudaStream_t stream) {
  if (from.d == 0) return cudaSuccess;
  dequantize_int4<<<pieces(from), kLanes, 0, stream>>>(from, basis);
  return cudaGetLastError();
}

}  // namespace lowrank
