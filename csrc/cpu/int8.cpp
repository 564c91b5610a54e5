#include "int8.h"

#include "coded_groups.h"
#include "philox.h"

namespace lowrank {
inline namespace LR_ISA {
namespace {

#ifdef __AVX512F__
__m512 widen(const float* x, __mmask16 some) { return _mm512_maskz_loadu_ps(some, x); }

__m512 widen(const bf16* x, __mmask16 some) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, x)), 16));
}

__m512 widen(const fp16* x, __mmask16 some) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, x)); }

// update_group on one thread. A group that keeps its scale, as nearly all do, takes two passes over 16 elements at a time; the
// new numbers wait in between, so that nothing is computed twice.
template <class G>
bool update_one(int8_t* codes, float* scale, const G* dense, int n, const Int8Update& u, const RandomStream& stream, uint64_t first,
                uint16_t* bits) {
  alignas(64) float numbers[kLargestGroup];
  const float inverse = int8_inverse(*scale);
  const __m512 alpha = _mm512_set1_ps(u.alpha), decay = _mm512_set1_ps(u.decay), factor = _mm512_set1_ps(inverse);
  const __m512 most = _mm512_set1_ps(kLargestFloat);
  const __m512i positive = _mm512_set1_epi32(0x7fffffff);
  __m512i largest = _mm512_setzero_si512();
  __mmask16 moved = 0;
  for (int i = 0; i < n; i += 16) {
    const __mmask16 some = n - i < 16 ? __mmask16((1u << (n - i)) - 1) : __mmask16(0xffff);
    const __m512 kept = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(some, codes + i)));
    const __m512 step = _mm512_mul_ps(alpha, widen(dense + i, some));
    const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(step), most, _CMP_LE_OQ);
    const __m512 y = _mm512_mask_add_ps(kept, finite, _mm512_mul_ps(decay, kept), _mm512_mul_ps(step, factor));
    moved |= _mm512_cmp_ps_mask(y, kept, _CMP_NEQ_UQ);
    largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(y), positive));
    _mm512_store_ps(numbers + i, y);
  }
  const uint32_t extent = _mm512_reduce_max_epu32(largest);
  if (inverse == 0.0f || (moved && (extent > float_bits(kCodeRange) || extent < float_bits(0.5f * kCodeRange))))
    return update_group<1>(OneThread{nullptr}, codes, scale, dense, n, u, [&](const OneThread&) {
      random_row(stream, first, n, bits);
      return bits + first % 8;
    });
  if (!moved) return false;
  random_row(stream, first, n, bits);
  const __m512 unit = _mm512_set1_ps(0x1p16f);
  const __m512i ones = _mm512_set1_epi32(0xffff);
  for (int i = 0; i < n; i += 16) {
    const __mmask16 some = n - i < 16 ? __mmask16((1u << (n - i)) - 1) : __mmask16(0xffff);
    const __m256i draw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits + first % 8 + i));
    const __m512i fixed = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(numbers + i), unit));
    const __m512i raised = _mm512_add_epi32(fixed, _mm512_sub_epi32(ones, _mm512_cvtepu16_epi32(draw)));
    _mm_mask_storeu_epi8(codes + i, some, _mm512_cvtepi32_epi8(_mm512_srai_epi32(raised, 16)));
  }
  return false;
}
#else
template <class G>
bool update_one(int8_t* codes, float* scale, const G* dense, int n, const Int8Update& u, const RandomStream& stream, uint64_t first,
                uint16_t* bits) {
  return update_group<1>(OneThread{nullptr}, codes, scale, dense, n, u, [&](const OneThread&) {
    random_row(stream, first, n, bits);
    return bits + first % 8;
  });
}
#endif

int64_t run_update(const Int8Matrix& w, const Matrix& dense, const CodedTile& tile, const Int8Step& step, int64_t begin,
                   int64_t end) {
  alignas(64) uint16_t bits[kRandomRoom];
  int64_t rescaled = 0;
  dispatch(dense.dtype, [&](auto type) {
    each_group<typename decltype(type)::type>(
        w, dense, tile, begin, end, [&](auto* codes, auto* scale, auto* x, int n, int64_t element) {
          rescaled += update_one(codes, scale, x, n, step.update, step.stream, step.offset + uint64_t(element), bits);
        });
  });
  return rescaled;
}

int64_t run_update_scaled(const Int8Matrix& w, const Matrix& dense, const float* by_row, const float* by_column,
                          const CodedTile& tile, const Int8Step& step, int64_t begin, int64_t end) {
  alignas(64) uint16_t bits[kRandomRoom];
  alignas(64) float scaled[kLargestGroup];
  int64_t rescaled = 0;
  dispatch(dense.dtype, [&](auto type) {
    each_group<typename decltype(type)::type>(
        w, dense, tile, begin, end, [&](auto* codes, auto* scale, auto* x, int n, int64_t element) {
          if (by_row != nullptr) {
            const float c = by_row[element / w.columns - tile.row];
            LR_SIMD
            for (int i = 0; i < n; ++i) scaled[i] = c * to_float(x[i]);
          } else {
            const float* c = by_column + (element % w.columns - tile.column);
            LR_SIMD
            for (int i = 0; i < n; ++i) scaled[i] = c[i] * to_float(x[i]);
          }
          rescaled += update_one(codes, scale, scaled, n, step.update, step.stream, step.offset + uint64_t(element), bits);
        });
  });
  return rescaled;
}

}  // namespace

extern const Int8Kernels int8_table;
const Int8Kernels int8_table = {{run_quantize<Int8Matrix>, run_dequantize<Int8Matrix>}, run_update, run_update_scaled};

}  // namespace LR_ISA
}  // namespace lowrank
