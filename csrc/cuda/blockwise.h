// Launchers of the kernels on blockwise 8-bit codes.
#pragma once

#include "../core/adam_8bit.h"
#include "launch.h"

namespace lowrank {

// Tensors that one launch updates; the whole list is a kernel argument.
struct Adam8bitList {
  static constexpr int kMost = 48;
  struct Item {
    void* w;
    const void* g;
    Moments8bit moments;
    float* step;
    int64_t numel;
  };
  Item items[kMost];
  int count = 0;
};

using DrawnAdam8bitList = DrawnList<Adam8bitList, 40>;

// Low-rank gradients and their updates.
struct LowRankAdam8bitList {
  static constexpr int kMost = 32;
  struct Item {
    const float* r;
    void* x;
    Moments8bit moments;
    const float* step;
    uint8_t* ok;  // a flag a channel, set to 1 before the launches
    RowBlocks blocks;
  };
  Item items[kMost];
  int count = 0;
};

struct LowRankAdam8bitScalars {
  double beta1, beta2, eps;
  const float *grad_scale, *found_inf;  // may be null
  bool left;
};

cudaError_t launch_quantize_blockwise(DType dtype, const void* x, uint8_t* codes, float* absmax, const RowBlocks& blocks,
                                      bool is_signed, cudaStream_t stream);
cudaError_t launch_dequantize_blockwise(const uint8_t* codes, const float* absmax, float* x, const RowBlocks& blocks,
                                        bool is_signed, cudaStream_t stream);

// One AdamW step of tensors that all have these dtypes, at steps that are already advanced.
cudaError_t launch_adam_8bit(DType w, DType g, const Adam8bitList& list, const AdamWScalars& scalars, cudaStream_t stream);
cudaError_t launch_adam_8bit(DType w, DType g, const DrawnAdam8bitList& list, const AdamWScalars& scalars, uint64_t seed,
                             cudaStream_t stream);

// Updates of dtype x. The first clears the flags of channels that are not usable, the second reads them.
cudaError_t launch_mark_channels(const LowRankAdam8bitList& list, const LowRankAdam8bitScalars& scalars, cudaStream_t stream);
cudaError_t launch_adam_8bit_low_rank(DType x, const LowRankAdam8bitList& list, const LowRankAdam8bitScalars& scalars,
                                      cudaStream_t stream);

}  // namespace lowrank
