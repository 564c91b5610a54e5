// Numbers that may lie on the device, read by a kernel.
#pragma once

#include "launch.h"

namespace lowrank {

__device__ inline double read(const Number& x) {
  switch (x.type) {
    case Number::Type::f32:
      return *static_cast<const float*>(x.device);
    case Number::Type::f64:
      return *static_cast<const double*>(x.device);
    case Number::Type::i32:
      return *static_cast<const int32_t*>(x.device);
    case Number::Type::i64:
      return double(*static_cast<const int64_t*>(x.device));
    default:
      return x.host;
  }
}

}  // namespace lowrank
