// The low-rank half of APOLLO's step: what the channels of the gradient are scaled by.
#pragma once

#include <cmath>

#include "../residual.h"
#include "hyper.h"
#include "products.h"

namespace lowrank {

// A gradient, its basis (a matrix or a key), and the moments of R.
struct LowRankGradient {
  const Tensor &grad, &basis, &exp_avg, &exp_avg_sq;
  bool left;
  int64_t channels() const { return grad.size(left ? 1 : 0); }
  int64_t depth() const { return grad.size(left ? 0 : 1); }
};

struct Buffers {
  Workspace work;
  Scratch update, inside, small;
};

// What is known of the channels after the low-rank half of a step.
struct Channels {
  std::vector<float> r_squares, n_squares, gradient_norms, coefficients;
  std::vector<uint8_t> ok;
  int64_t skipped = 0;
  explicit Channels(int64_t count) : r_squares(count), n_squares(count), coefficients(count), ok(count) {}
};

struct Scaling {
  double alpha, growth;
  bool per_tensor;
  double front, behind;  // factors that the limiter sees, and does not
};

inline Scaling apollo_scaling(double scale, bool per_tensor, bool scale_front, double growth) {
  const double root = std::sqrt(scale);
  return {0.0, growth, per_tensor, scale_front ? root : 1.0, scale_front ? 1.0 : root};
}

// sqrt(1 - beta2^t) / (1 - beta1^t): bias correction where it multiplies the rate.
inline float corrected(const AdamStep& s) { return s.alpha * (std::sqrt(s.correction2) / s.correction1); }

// The list of a state that may be absent as a whole: entry i, or none.
inline std::optional<Tensor> entry(const Tensors& list, size_t i) {
  if (list.empty()) return std::nullopt;
  return list[i];
}

// Advances the moments and the limiter; the coefficients are what G is multiplied by, NaN in channels that are left out.
Channels apollo_channels(const LowRankGradient& t, const std::optional<Tensor>& limiter, const AdamStep& step, float grad_scale,
                         const Scaling& how, Buffers& buffers);

}  // namespace lowrank
