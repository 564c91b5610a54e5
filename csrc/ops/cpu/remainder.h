// What stands between the rule and the weights: how much of the gradient each channel of the remainder gets.
#pragma once

#include "rule.h"

namespace lowrank {

// How a norm ratio scales its channel, s = |N| / |R|, or that of the whole matrix.
struct Scaling {
  double alpha;          // the residual is G - alpha back(R)
  double front, behind;  // factors that the limiter sees, and does not
  bool per_tensor;
  double growth;  // the most by which the limiter lets the norm of the scaled remainder grow in a step
};

// The coefficients of a norm ratio, NaN in channels that are left out; advances the limiter, unless it is null. `in_basis` is
// RᵀBᵀBR by channel, or empty where that is |R|².
std::vector<float> ratio_coefficients(const Channels& c, const Scaling& how, float* limiter, const std::vector<float>& in_basis,
                                      float grad_scale);

// One for all channels, NaN in those that are left out.
std::vector<float> equal_coefficients(const Channels& c, double coefficient);

// RᵀBᵀBR by channel, from the Gram matrix BᵀB; y is scratch of R's shape.
std::vector<float> norms_in_basis(const Tensor& r, const Tensor& gram, const Tensor& y, bool left);

// x <- p x - q c r, with c the coefficient of the channel.
void combine(const Tensor& x, const Tensor& r, const std::vector<float>& coefficients, double p, double q, bool left);

}  // namespace lowrank
