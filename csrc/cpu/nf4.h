// NF4 weights on raw pointers. The unit of work is a group: group i of a tile counts along its rows.
#pragma once

#include "../core/nf4.h"
#include "int8.h"

namespace lowrank {

struct Nf4Kernels {
  // Groups [begin, end) of `tile`; `dense` has the tile's shape.
  void (*quantize)(const Matrix& dense, const Nf4Matrix& w, const Int8Tile& tile, int64_t begin, int64_t end);
  void (*dequantize)(const Nf4Matrix& w, const Matrix& dense, const Int8Tile& tile, int64_t begin, int64_t end);
};

const Nf4Kernels& nf4_kernels();

}  // namespace lowrank
