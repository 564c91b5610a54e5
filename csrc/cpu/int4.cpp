#include "int4.h"

#include <algorithm>

#include "one_thread.h"

namespace lowrank {
inline namespace LR_ISA {
namespace {

// Pieces of the same rows follow each other: their lines of the basis are on the same pages.
Int4Piece piece_of(const Int4& basis, int64_t i) {
  const int64_t across = (basis.r + kVectors - 1) / kVectors;
  return int4_piece(basis, i % across * kVectors, i / across);
}

void run_quantize(const Matrix& basis, const Int4& to, int64_t begin, int64_t end) {
  dispatch(basis.dtype, [&](auto type) {
    const auto* data = static_cast<const typename decltype(type)::type*>(basis.data);
    for (int64_t i = begin; i < end; ++i) {
      const Int4Piece p = piece_of(to, i);
      const auto* from = data + p.entry * basis.stride + p.vector;
      quantize_int4_group(OneThread{nullptr}, from, basis.stride, p.at, p.entries, p.vectors);
    }
  });
}

void run_dequantize(const Int4& from, float* basis, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const Int4Piece p = piece_of(from, i);
    dequantize_int4_group(OneThread{nullptr}, p.at, basis + p.entry * from.r + p.vector, from.r, p.entries, p.vectors);
  }
}

// `bytes` whole bytes of one group.
void unpack_bytes(const uint8_t* packed, float scale, float offset, float* to, int64_t bytes) {
  LR_SIMD
  for (int64_t k = 0; k < bytes; ++k) {
    to[2 * k] = int4_value(packed[k] & 15, scale, offset);
    to[2 * k + 1] = int4_value(packed[k] >> 4, scale, offset);
  }
}

void run_unpack(const Int4& from, float* to, int64_t vector, int64_t first, int64_t count, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* packed = from.packed + (vector + row) * from.width();
    const float *scale = from.scale + (vector + row) * from.groups(), *offset = from.offset + (vector + row) * from.groups();
    float* out = to + row * count;
    for (int64_t at = first; at < first + count;) {
      const int64_t group = at / from.group_size, stop = std::min((group + 1) * from.group_size, first + count);
      // Whole bytes at once; half a byte where the range begins or ends within one.
      const int64_t bytes = at % 2 ? 0 : (stop - at) / 2, taken = std::max<int64_t>(2 * bytes, 1);
      if (bytes > 0) {
        unpack_bytes(packed + at / 2, scale[group], offset[group], out + at - first, bytes);
      } else {
        out[at - first] = int4_value(packed[at / 2] >> at % 2 * 4 & 15, scale[group], offset[group]);
      }
      at += taken;
    }
  }
}

}  // namespace

extern const Int4Kernels int4_table;
const Int4Kernels int4_table = {run_quantize, run_dequantize, run_unpack};

}  // namespace LR_ISA
}  // namespace lowrank
