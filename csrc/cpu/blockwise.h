// Blockwise 8-bit codes on raw pointers.
#pragma once

#include "../core/adam_8bit.h"
#include "matrix.h"

namespace lowrank {

// Values and their codes.
struct Blockwise {
  DType dtype;  // of the values; of decoded ones fp32
  void* values;
  uint8_t* codes;
  float* absmax;
  RowBlocks blocks;
  bool is_signed;
};

struct Adam8bit {
  DType w_dtype, g_dtype;
  void* w;
  const void* g;
  Moments8bit moments;
  int64_t numel;
  float grad_scale;
  AdamStep step;
  Rounding rounding;
};

struct LowRankAdam8bit {
  const float* r;
  DType x_dtype;
  void* x;  // may be r; NaN in channels that are left out
  Moments8bit moments;
  const uint8_t* ok;  // a flag a channel, or null: all are usable
  RowBlocks blocks;
  bool left;
  float grad_scale;
  AdamStep step;
};

struct BlockwiseKernels {
  // All of them on blocks [begin, end).
  void (*quantize)(const Blockwise&, int64_t begin, int64_t end);
  void (*dequantize)(const Blockwise&, int64_t begin, int64_t end);
  // Returns how many elements were left out.
  int64_t (*adam)(const Adam8bit&, int64_t begin, int64_t end);
  // Clears the flags of channels that are not usable. Any order of calls gives the same flags.
  void (*mark_channels)(const LowRankAdam8bit&, uint8_t* ok, int64_t begin, int64_t end);
  void (*low_rank_adam)(const LowRankAdam8bit&, int64_t begin, int64_t end);
};

const BlockwiseKernels& blockwise_kernels();

}  // namespace lowrank
