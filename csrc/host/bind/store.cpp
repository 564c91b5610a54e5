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

}  // namespace

void bind_store(py::module_& module) {
  module.def("widen", &widen, py::arg("source"), py::arg("dtype"), py::arg("out"));
  module.def("narrow", &narrow, py::arg("source"), py::arg("dtype"), py::arg("out"));
}

}  // namespace lowrank
