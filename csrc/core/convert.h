// float <-> bfloat16 and float16: round to nearest even, NaN stays NaN. Written on the bits, so every backend agrees.
#pragma once

#include <cstring>

#include "common.h"

LR_BEGIN

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

LR_HD uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}

LR_HD float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

LR_HD float to_float(float x) { return x; }

LR_HD float to_float(bf16 x) { return bits_float(uint32_t(x.bits) << 16); }

LR_HD float to_float(fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = uint32_t(x.bits & 0x7fff);
  // The exponent is rebiased by 112; infinity and NaN take another 112 and so reach fp32's last exponent.
  const uint32_t normal = (magnitude << 13) + (magnitude >= 0x7c00 ? 0x70000000u : 0x38000000u);
  const uint32_t subnormal = float_bits(float(int32_t(magnitude)) * 0x1p-24f);
  return bits_float(sign | (magnitude < 0x0400 ? subnormal : normal));
}

// a if ok, else b: without a branch, also where T is a struct.
LR_HD float choose(bool ok, float a, float b) { return ok ? a : b; }

template <class T>
LR_HD T choose(bool ok, T a, T b) {
  return {uint16_t(ok ? a.bits : b.bits)};
}

template <class T>
LR_HD T from_float(float x);

template <>
LR_HD float from_float<float>(float x) {
  return x;
}

template <>
LR_HD bf16 from_float<bf16>(float x) {
  const uint32_t u = float_bits(x);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16, quiet = (u >> 16) | 0x40;
  return {uint16_t((u & 0x7fffffff) > 0x7f800000 ? quiet : rounded)};
}

template <>
LR_HD fp16 from_float<fp16>(float x) {
  const uint32_t u = float_bits(x), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  const uint32_t normal = (magnitude - 0x38000000u + 0x0fff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 makes the unit in the last place of fp32 that of a subnormal fp16.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return {uint16_t(sign | (magnitude < 0x477ff000u ? finite : special))};
}

LR_END
