// Adam steps on raw pointers.
#pragma once

#include "../core/adam.h"
#include "../core/rounding.h"
#include "matrix.h"

namespace lowrank {

struct LowRankAdam {
  const float* r;
  float *m, *v, *x;  // x may be r
  uint8_t* ok;       // one flag a channel
  int64_t rows, columns;
  float grad_scale;
  AdamStep step;
};

struct AdamW {
  DType w_dtype, g_dtype;
  void* w;
  const void* g;
  float *m, *v;
  float grad_scale;
  AdamStep step;
  Rounding rounding;
};

struct StepKernels {
  // Columns, or rows, [begin, end) of a low-rank gradient; returns how many channels were left out.
  int64_t (*adam_columns)(const LowRankAdam&, int64_t begin, int64_t end);
  int64_t (*adam_rows)(const LowRankAdam&, int64_t begin, int64_t end);
  // Elements [begin, end); returns how many were left out.
  int64_t (*adamw)(const AdamW&, int64_t begin, int64_t end);
};

const StepKernels& step_kernels();

}  // namespace lowrank
