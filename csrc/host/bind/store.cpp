#include "../../core/store.h"

#include "bind.h"

namespace lowrank {
namespace {

void widen(Array from, const std::string& dtype, Array to) {
  dispatch(parse(dtype), [&](auto type) {
    const auto* x = data<typename decltype(type)::type>(from);
    for (py::ssize_t i = 0; i < from.size(); ++i) data<float>(to)[i] = to_float(x[i]);
  });
}

void narrow(Array from, const std::string& dtype, Array to) {
  dispatch(parse(dtype), [&](auto type) {
    using T = typename decltype(type)::type;
    for (py::ssize_t i = 0; i < from.size(); ++i) data<T>(to)[i] = from_float<T>(data<float>(from)[i]);
  });
}

// With the bits of elements from `first` on.
void round(int threads, int vector, Array from, const std::string& dtype, uint64_t seed, uint32_t step, uint32_t parameter,
           uint64_t first, Array to) {
  const Drawing drawing{{seed, step, parameter}, first};
  const float* x = data<float>(from);
  dispatch(parse(dtype), [&](auto type) {
    auto* w = data<typename decltype(type)::type>(to);
    run_block(threads, [&](const auto& block) {
      vector == 8   ? round_row<8>(block, w, x, from.size(), drawing)
      : vector == 4 ? round_row<4>(block, w, x, from.size(), drawing)
                    : round_row<1>(block, w, x, from.size(), drawing);
    });
  });
}

}  // namespace

void bind_store(py::module_& module) {
  module.def("widen", &widen, py::arg("source"), py::arg("dtype"), py::arg("out"));
  module.def("round", &round, py::arg("threads"), py::arg("vector"), py::arg("source"), py::arg("dtype"), py::arg("seed"),
             py::arg("step"), py::arg("parameter"), py::arg("first"), py::arg("out"));
  module.def("narrow", &narrow, py::arg("source"), py::arg("dtype"), py::arg("out"));
}

}  // namespace lowrank
