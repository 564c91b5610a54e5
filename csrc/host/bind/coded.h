// Weights in codes, of a kind M of Coded: run by each coding's bindings.
#pragma once

#include "../../core/coded.h"
#include "bind.h"

namespace lowrank {

template <class M>
M coded(Array& codes, Array& scale, const Array& dense, int group_size) {
  return {data<typename M::Code>(codes), data<float>(scale), dense.shape(1), group_size};
}

// Calls f(type, constant of the vector's length, block, group) for every group of w, on every thread.
template <class M, class F>
void each_group(int threads, int vector, const std::string& dtype, const M& w, int64_t rows, const F& f) {
  const auto each = [&](auto type, auto v, const auto& block) {
    for (int64_t i = 0; i < rows * w.groups(); ++i) f(type, v, block, w.group(i));
  };
  dispatch(parse(dtype), [&](auto type) {
    run_block(threads, [&](const auto& block) {
      if (vector == 8) {
        each(type, std::integral_constant<int, 8>{}, block);
      } else {
        each(type, std::integral_constant<int, 1>{}, block);
      }
    });
  });
}

template <class M>
void quantize(int threads, int vector, Array dense, const std::string& dtype, Array codes, Array scale, int group_size) {
  const M w = coded<M>(codes, scale, dense, group_size);
  void* values = data<void>(dense);
  each_group(threads, vector, dtype, w, dense.shape(0), [&](auto type, auto v, const auto& block, const auto& g) {
    const auto* x = static_cast<const typename decltype(type)::type*>(values) + g.element;
    quantize_group<decltype(v)::value>(block, x, g.n, w.codes + g.code, w.scale + g.index);
  });
}

template <class M>
void dequantize(int threads, int vector, Array codes, Array scale, Array dense, const std::string& dtype, int group_size) {
  const M w = coded<M>(codes, scale, dense, group_size);
  void* values = data<void>(dense);
  each_group(threads, vector, dtype, w, dense.shape(0), [&](auto type, auto v, const auto& block, const auto& g) {
    auto* x = static_cast<typename decltype(type)::type*>(values) + g.element;
    dequantize_group<decltype(v)::value>(block, w.codes + g.code, w.scale[g.index], g.n, x);
  });
}

}  // namespace lowrank
