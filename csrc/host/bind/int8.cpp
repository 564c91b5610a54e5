#include "../../core/int8.h"

#include "bind.h"

namespace lowrank {
namespace {

// Calls f(block, group's first element, its scale's index, its length) for every group, on every thread.
template <class Block, class F>
void each_group(const Block& block, const Int8Matrix& w, int64_t rows, const F& f) {
  for (int64_t i = 0; i < rows * w.groups(); ++i) {
    const int64_t column = i % w.groups() * w.group_size;
    f(block, i / w.groups() * w.columns + column, i, w.length(column));
  }
}

Int8Matrix matrix(Array& codes, Array& scale, int group_size) {
  return {data<int8_t>(codes), data<float>(scale), codes.shape(1), group_size};
}

// Calls f(type, block, constant of the vector's length).
template <class F>
void run(int threads, int vector, const std::string& dtype, const F& f) {
  dispatch(parse(dtype), [&](auto type) {
    run_block(threads, [&](const auto& block) {
      if (vector == 8) {
        f(type, block, std::integral_constant<int, 8>{});
      } else {
        f(type, block, std::integral_constant<int, 1>{});
      }
    });
  });
}

void quantize(int threads, int vector, Array dense, const std::string& dtype, Array codes, Array scale, int group_size) {
  const Int8Matrix w = matrix(codes, scale, group_size);
  void* values = data<void>(dense);
  run(threads, vector, dtype, [&](auto type, const auto& block, auto v) {
    const auto* x = static_cast<const typename decltype(type)::type*>(values);
    each_group(block, w, codes.shape(0), [&](const auto& b, int64_t element, int64_t i, int n) {
      quantize_group<decltype(v)::value>(b, x + element, n, w.codes + element, w.scale + i);
    });
  });
}

void dequantize(int threads, int vector, Array codes, Array scale, Array dense, const std::string& dtype, int group_size) {
  const Int8Matrix w = matrix(codes, scale, group_size);
  void* values = data<void>(dense);
  run(threads, vector, dtype, [&](auto type, const auto& block, auto v) {
    auto* x = static_cast<typename decltype(type)::type*>(values);
    each_group(block, w, codes.shape(0), [&](const auto& b, int64_t element, int64_t i, int n) {
      dequantize_group<decltype(v)::value>(b, w.codes + element, w.scale[i], n, x + element);
    });
  });
}

// Returns how many groups have a new scale.
int64_t update(int threads, int vector, Array codes, Array scale, Array dense, const std::string& dtype, float alpha, float decay,
               uint64_t seed, uint32_t step, uint32_t parameter, uint64_t offset, int group_size) {
  const Int8Matrix w = matrix(codes, scale, group_size);
  void* values = data<void>(dense);
  alignas(16) uint16_t bits[kLargestGroup + 16];
  std::atomic<int64_t> rescaled = 0;
  run(threads, vector, dtype, [&](auto type, const auto& block, auto v) {
    const auto* x = static_cast<const typename decltype(type)::type*>(values);
    each_group(block, w, codes.shape(0), [&](const auto& b, int64_t element, int64_t i, int n) {
      const uint64_t first = offset + uint64_t(element);
      const bool is_new = update_group<decltype(v)::value>(b, w.codes + element, w.scale + i, x + element, n,
                                                           Int8Update{alpha, decay}, [&](const auto& mine) {
                                                             random_bits(mine, {seed, step, parameter}, first, n, bits);
                                                             return bits + first % 8;
                                                           });
      if (b.tid == 0) rescaled += is_new;
    });
  });
  return rescaled;
}

}  // namespace

void bind_int8(py::module_& module) {
  module.def("quantize_int8", &quantize, py::arg("threads"), py::arg("vector"), py::arg("dense"), py::arg("dtype"),
             py::arg("codes"), py::arg("scale"), py::arg("group_size"));
  module.def("dequantize_int8", &dequantize, py::arg("threads"), py::arg("vector"), py::arg("codes"), py::arg("scale"),
             py::arg("dense"), py::arg("dtype"), py::arg("group_size"));
  module.def("update_int8", &update, py::arg("threads"), py::arg("vector"), py::arg("codes"), py::arg("scale"), py::arg("dense"),
             py::arg("dtype"), py::arg("alpha"), py::arg("decay"), py::arg("seed"), py::arg("step"), py::arg("parameter"),
             py::arg("offset"), py::arg("group_size"));
}

}  // namespace lowrank
