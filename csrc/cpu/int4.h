// INT4 bases on raw pointers.
#pragma once

#include "../core/int4.h"
#include "matrix.h"

namespace lowrank {

struct Int4Kernels {
  // Pieces [begin, end) of int4_pieces(to): groups of up to 32 vectors.
  void (*quantize)(const Matrix& basis, const Int4& to, int64_t begin, int64_t end);
  void (*dequantize)(const Int4& from, float* basis, int64_t begin, int64_t end);
  // Entries [first, first + count) of the vectors vector + [begin, end) to rows [begin, end) of `to`, contiguous.
  void (*unpack)(const Int4& from, float* to, int64_t vector, int64_t first, int64_t count, int64_t begin, int64_t end);
};

inline int64_t int4_pieces(const Int4& basis) { return basis.groups() * ((basis.r + kVectors - 1) / kVectors); }

const Int4Kernels& int4_kernels();

}  // namespace lowrank
