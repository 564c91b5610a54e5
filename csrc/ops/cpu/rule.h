// The rule of a step: Adam on R channel by channel, whatever stores the moments.
#pragma once

#include "../step.h"
#include "hyper.h"

namespace lowrank {

// What is known of the channels once the rule has run. Those that are left out keep their moments; X is NaN, or 0, there.
struct Channels {
  std::vector<uint8_t> ok;
  int64_t skipped = 0;
  std::vector<float> r_squares, n_squares;  // of ratios: sums of squares of R and of N, 0 where left out
  std::vector<float> gradient_norms;        // of ratios with a limiter

  int64_t count() const { return int64_t(ok.size()); }
  // A flag a channel, or null: all are usable.
  const uint8_t* flags() const { return skipped > 0 ? ok.data() : nullptr; }
};

// x <- Adam(grad_scale * r), NaN in channels that are left out: those with a value that is not usable. x may be r; with 8-bit
// moments it may be bf16 or fp16.
Channels adam(const Tensor& r, const Moments& moments, const Tensor& x, const AdamStep& step, float grad_scale, bool left);

// r <- grad_scale * r, x <- N = M / (sqrt(V) + eps). Left out are channels whose sum of squares of R, or of `limited`, the full
// gradient if there is a limiter, is not finite. Without x, r holds what it likes afterwards.
Channels ratio(const Tensor& r, const Moments& moments, const Tensor* x, const Tensor* limited, const AdamStep& step,
               float grad_scale, bool left);

}  // namespace lowrank
