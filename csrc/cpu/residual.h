// Steps with a residual, on raw pointers.
#pragma once

#include "../core/adam.h"
#include "../core/rounding.h"
#include "matrix.h"

namespace lowrank {

struct Ratio {
  float *r, *m, *v, *x;  // R, scaled in place; x gets N, or is null
  float *r_squares, *n_squares;
  const float* gradient_norms;  // one a channel, or null
  uint8_t* ok;
  int64_t rows, columns;
  float grad_scale;
  AdamStep step;
};

struct Squares {
  float *r, *squares;  // one sum a channel
  int64_t rows, columns;
  float factor;
};

struct Move {
  Matrix w, g;
  const float *back, *inside;                           // contiguous, or null
  const float *row_coefficients, *column_coefficients;  // one of the two
  int64_t columns;
  float decay, alpha;
  Rounding rounding;  // from w's first element on
};

struct ResidualKernels {
  // Channels [begin, end): columns or rows of R; returns how many were left out.
  int64_t (*ratio_columns)(const Ratio&, int64_t begin, int64_t end);
  int64_t (*ratio_rows)(const Ratio&, int64_t begin, int64_t end);
  // The same channels: r <- factor * r, and the sums of its squares.
  void (*square_columns)(const Squares&, int64_t begin, int64_t end);
  void (*square_rows)(const Squares&, int64_t begin, int64_t end);
  // Rows [begin, end) of the weight.
  void (*move)(const Move&, int64_t begin, int64_t end);
  // Rows [begin, end) of x <- p x - q c r, with one c a channel.
  void (*combine)(float* x, const float* r, const float* row_c, const float* column_c, float p, float q, int64_t columns,
                  int64_t begin, int64_t end);
};

const ResidualKernels& residual_kernels();

}  // namespace lowrank
