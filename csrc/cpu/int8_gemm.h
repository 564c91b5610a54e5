// Products in INT8 (core/int8_gemm.h) on raw pointers.
#pragma once

#include "../core/rounding.h"
#include "matrix.h"

namespace lowrank {

// Channels of an operand that are quantised together, and columns of a product that are made together.
constexpr int64_t kInt8Block = 64;
// Rows of a product that are made together.
constexpr int64_t kInt8Rows = 16;

// What an operand is made from: `channels` vectors of `depth` numbers, which are the columns of `matrix` or its rows.
struct Int8Source {
  Matrix matrix;
  int64_t channels, depth;
  bool columns;
};

// A quantised operand: by group of the depth, then by channel or block of channels, of which the last is filled with zeros.
struct Int8Operand {
  uint8_t* codes;
  float* scale;
  int32_t* sum;  // of a group's codes, where the channels are rows of the product; null where they are columns
  int64_t channels, depth;

  int64_t blocks() const { return (channels + kInt8Block - 1) / kInt8Block; }
  int64_t groups() const { return (depth + 255) / 256; }
  int64_t padded() const { return blocks() * kInt8Block; }
  // Bytes of a channel's group: whole words of four codes.
  int64_t width() const { return smaller(256, (depth + 3) / 4 * 4); }
};

struct Int8Back {
  Int8Operand rows, columns;
  Matrix w;
  const uint8_t *ok_rows, *ok_columns;  // may be null
  float decay, alpha;
  Rounding rounding;  // from w's first element on
};

struct Int8GemmKernels {
  // Parts [begin, end) of an operand: part i is block i % blocks of group i / blocks.
  void (*quantize)(const Int8Source&, const Int8Operand&, int64_t begin, int64_t end);
  // Blocks of columns [begin, end) of out (rows.channels, source.channels): the product's columns are those of the source.
  void (*project_columns)(const Int8Operand& rows, const Int8Source&, float* out, int64_t begin, int64_t end);
  // Blocks of kInt8Rows rows [begin, end) of out (source.channels, columns.channels): its rows are those of the source.
  void (*project_rows)(const Int8Source&, const Int8Operand& columns, float* out, int64_t begin, int64_t end);
  // Blocks of kInt8Rows rows [begin, end): w <- decay * w + alpha * product, where ok.
  void (*back)(const Int8Back&, int64_t begin, int64_t end);
};

const Int8GemmKernels& int8_gemm_kernels();

}  // namespace lowrank
