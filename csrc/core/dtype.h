// The storage types, by code and by C++ type.
#pragma once

#include "convert.h"

namespace lowrank {

enum class DType : int { f32, bf16, f16 };

}  // namespace lowrank

LR_BEGIN

template <class T>
struct Type {
  using type = T;
};

// f(Type<T>{}) for the C++ type T of dtype.
template <class F>
auto dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::bf16:
      return f(Type<bf16>{});
    case DType::f16:
      return f(Type<fp16>{});
    default:
      return f(Type<float>{});
  }
}

LR_END
