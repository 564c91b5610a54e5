// Adam on a low-rank gradient, with 8-bit moments, for every step that needs it.
#pragma once

#include "../blockwise.h"
#include "hyper.h"

namespace lowrank {

// x <- Adam(grad_scale * r), NaN in channels that are not usable, whose flags in `ok` (one a channel) are 0; moments advance as
// in adam_8bit_low_rank_. x: r's shape, fp32 | bf16 | fp16, may be r. Returns how many channels were left out.
int64_t adam_8bit_low_rank(const Tensor& r, const Stored& moments, const Tensor& x, std::vector<uint8_t>& ok, const AdamStep& step,
                           float grad_scale, bool left);

}  // namespace lowrank
