// Products in INT8: both operands are quantised in groups along the summed axis, codes are multiplied and summed as integers.
//
//   scale = absmax / 127        code = round(x / scale)
//   C_ij = sum over groups, in order, of (scale_i scale_j) sum_k a_ik b_jk
#pragma once

#include "int8.h"

LR_BEGIN

constexpr int kGemmGroup = 256;
constexpr float kGemmUnit = 1.0f / 127.0f;

// Scale of a group by its largest magnitude. NaN where the group holds a NaN or an infinity: every sum with it is NaN then.
LR_HD float gemm_scale(uint32_t largest) { return int8_scale(largest, kGemmUnit); }

// The code of x in the low byte, in two's complement: added to 1.5 * 2^23, a number rounds to the nearest integer, ties to
// even. A group without a scale has inverse 0; codes of one that holds a NaN are any.
LR_HD uint32_t gemm_code(float x, float inverse) { return float_bits(x * inverse + 0x1.8p23f); }

// A sum with one more group, whose codes' product is `dot`: |dot| <= 256 * 127^2 is exact in fp32.
LR_HD float gemm_add(float sum, float scale_a, float scale_b, int32_t dot) { return sum + (scale_a * scale_b) * float(dot); }

LR_END
