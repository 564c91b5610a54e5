#include "../../core/nf4.h"

#include "bind.h"

namespace lowrank {
namespace {

// Calls f(type, constant of the vector's length, block, matrix, group's first element, its first byte, its index, its length).
template <class F>
void run(int threads, int vector, Array& packed, Array& absmax, Array& dense, const std::string& dtype, int group_size,
         const F& f) {
  const Nf4Matrix w{data<uint8_t>(packed), data<float>(absmax), dense.shape(1), group_size};
  const int64_t groups = dense.shape(0) * w.groups();
  const auto each = [&](auto type, auto v, const auto& block) {
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t row = i / w.groups(), column = i % w.groups() * group_size;
      f(type, v, block, w, row * w.columns + column, row * w.width() + column / 2, i, w.length(column));
    }
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

void quantize(int threads, int vector, Array dense, const std::string& dtype, Array packed, Array absmax, int group_size) {
  void* values = data<void>(dense);
  run(threads, vector, packed, absmax, dense, dtype, group_size,
      [&](auto type, auto v, const auto& block, const Nf4Matrix& w, int64_t element, int64_t byte, int64_t i, int n) {
        const auto* x = static_cast<const typename decltype(type)::type*>(values) + element;
        quantize_nf4_group<decltype(v)::value>(block, x, n, w.packed + byte, w.absmax + i);
      });
}

void dequantize(int threads, int vector, Array packed, Array absmax, Array dense, const std::string& dtype, int group_size) {
  void* values = data<void>(dense);
  run(threads, vector, packed, absmax, dense, dtype, group_size,
      [&](auto type, auto v, const auto& block, const Nf4Matrix& w, int64_t element, int64_t byte, int64_t i, int n) {
        auto* x = static_cast<typename decltype(type)::type*>(values) + element;
        dequantize_nf4_group<decltype(v)::value>(block, w.packed + byte, w.absmax[i], n, x);
      });
}

}  // namespace

void bind_nf4(py::module_& module) {
  module.def("quantize_nf4", &quantize, py::arg("threads"), py::arg("vector"), py::arg("dense"), py::arg("dtype"),
             py::arg("packed"), py::arg("absmax"), py::arg("group_size"));
  module.def("dequantize_nf4", &dequantize, py::arg("threads"), py::arg("vector"), py::arg("packed"), py::arg("absmax"),
             py::arg("dense"), py::arg("dtype"), py::arg("group_size"));
}

}  // namespace lowrank
