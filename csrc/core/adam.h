// Adam and AdamW on one element, in torch.optim.AdamW's order: decay before the update, eps after bias correction.
#pragma once

#include "common.h"

namespace lowrank {

// What one step needs, computed once per matrix. Outside LR_BEGIN: kernels of every instruction set take it.
struct AdamStep {
  float beta1, beta2, one_minus_beta1, one_minus_beta2, correction1, correction2, eps;
  float decay;  // 1 - lr * weight_decay
  float alpha;  // -lr * scale, where scale is 1 for a plain AdamW
};

}  // namespace lowrank

LR_BEGIN

// 1 - beta^step, by expm1: the plain difference loses half of fp32's digits at the first steps.
LR_HD float bias_correction(double beta, double step) { return float(-expm1(step * log(beta))); }

LR_HD AdamStep adam_step(double beta1, double beta2, double eps, double weight_decay, double scale, double lr, double step) {
  return {float(beta1),
          float(beta2),
          float(1 - beta1),
          float(1 - beta2),
          bias_correction(beta1, step),
          bias_correction(beta2, step),
          float(eps),
          float(1 - lr * weight_decay),
          float(-lr * scale)};
}

// |g| < 2^64 keeps g² finite in fp32; false for NaN.
LR_HD bool usable(float g) { return fabsf(g) < 0x1p64f; }

// Advances both moments by g and returns m̂ / (sqrt(v̂) + eps).
LR_HD float adam_update(float g, float& m, float& v, const AdamStep& s) {
  m = s.beta1 * m + s.one_minus_beta1 * g;
  v = s.beta2 * v + s.one_minus_beta2 * g * g;
  return (m / s.correction1) / (sqrtf(v / s.correction2) + s.eps);
}

LR_HD float apply_update(float w, float update, const AdamStep& s) { return s.decay * w + s.alpha * update; }

LR_END
