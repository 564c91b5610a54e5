#include "gaussian.h"

#include "one_thread.h"

#ifdef __AVX512F__
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace lowrank {
inline namespace LR_ISA {
namespace {

#ifdef __AVX512F__
// Philox on 16 counters: 32 x 32 bit products of the even and of the odd lanes, which compilers do not find by themselves.
struct FastWords {
  static void product(__m512i multiplier, __m512i x, __m512i& high, __m512i& low) {
    const __m512i even = _mm512_mul_epu32(multiplier, x), odd = _mm512_mul_epu32(multiplier, _mm512_srli_epi64(x, 32));
    low = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
    high = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
  }

  static void draw(const GaussianBasis& b, uint64_t first, uint32_t (&words)[4][kWide]) {
    const __m512i a = _mm512_set1_epi32(int32_t(0xD2511F53u)), c = _mm512_set1_epi32(int32_t(0xCD9E8D57u));
    for (int j = 0; j < kWide; j += 16) {
      const uint64_t counter = first + uint64_t(j);
      const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
      const __m512i low = _mm512_set1_epi32(int32_t(uint32_t(counter)));
      __m512i c0 = _mm512_add_epi32(low, lane);
      const __mmask16 carry = _mm512_cmplt_epu32_mask(c0, low);
      const __m512i second = _mm512_set1_epi32(int32_t(uint32_t(counter >> 32)));
      __m512i c1 = _mm512_or_si512(_mm512_mask_add_epi32(second, carry, second, _mm512_set1_epi32(1)),
                                   _mm512_set1_epi32(int32_t(kGaussianTag)));
      __m512i c2 = _mm512_set1_epi32(int32_t(b.refresh)), c3 = _mm512_set1_epi32(int32_t(b.parameter));
      uint32_t k0 = uint32_t(b.seed), k1 = uint32_t(b.seed >> 32);
      for (int round = 0; round < 10; ++round) {
        __m512i high_a, low_a, high_c, low_c;
        product(a, c0, high_a, low_a), product(c, c2, high_c, low_c);
        c0 = _mm512_ternarylogic_epi32(high_c, c1, _mm512_set1_epi32(int32_t(k0)), 0x96);
        c2 = _mm512_ternarylogic_epi32(high_a, c3, _mm512_set1_epi32(int32_t(k1)), 0x96);
        c1 = low_c, c3 = low_a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
      }
      const __m512i all[4] = {c0, c1, c2, c3};
      for (int k = 0; k < 4; ++k) _mm512_storeu_si512(words[k] + j, all[k]);
    }
  }
};
#else
using FastWords = PhiloxWords;
#endif

void run_rows(const Matrix& out, const GaussianBasis& basis, int64_t first, int64_t last, int64_t begin, int64_t end) {
  dispatch(out.dtype, [&](auto type) {
    auto* data = static_cast<typename decltype(type)::type*>(out.data);
    for (int64_t group = begin; group < end; ++group)
      for (int64_t column = 0; column < basis.rank; column += kWide)
        gaussian_rows<FastWords>(OneThread{nullptr}, data + column, out.stride, group, column,
                                 int(smaller(kWide, basis.rank - column)), first, last, basis);
  });
}

}  // namespace

extern const GaussianKernels gaussian_table;
const GaussianKernels gaussian_table = {run_rows};

}  // namespace LR_ISA
}  // namespace lowrank
