// fp32 values into weights, rounded stochastically: one read of the values and one write of the weights.
#include "../core/store.h"
#include "block.cuh"
#include "launch.h"
#include "number.cuh"

LR_BEGIN
namespace {

constexpr int kThreads = 256, kVector = 8, kChunk = kThreads * kVector;

template <int V, class W>
__global__ void __launch_bounds__(kThreads, 4)
    round_stochastic(W* w, const float* values, int64_t n, const Rounding rounding, const __grid_constant__ Number step) {
  const int64_t begin = int64_t(blockIdx.x) * kChunk, left = n - begin;
  const Drawing drawing{{rounding.stream.seed, counter_step(read(step)), rounding.stream.parameter}, rounding.first};
  const GpuBlock<kThreads> block{int(threadIdx.x), nullptr};
  round_row<V>(block, w + begin, values + begin, left < kChunk ? left : kChunk, drawing.run(begin, kChunk));
}

}  // namespace
LR_END

namespace lowrank {

cudaError_t launch_round(DType dtype, void* w, const float* values, int64_t n, const Rounding& rounding, const Number& step,
                         cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const unsigned blocks = unsigned((n + kChunk - 1) / kChunk);
  const bool aligned = (uintptr_t(w) | uintptr_t(values)) % 16 == 0;
  return dispatch(dtype, [&](auto type) {
    using W = typename decltype(type)::type;
    W* to = static_cast<W*>(w);
    aligned ? round_stochastic<kVector><<<blocks, kThreads, 0, stream>>>(to, values, n, rounding, step)
            : round_stochastic<1><<<blocks, kThreads, 0, stream>>>(to, values, n, rounding, step);
    return cudaGetLastError();
  });
}

}  // namespace lowrank
