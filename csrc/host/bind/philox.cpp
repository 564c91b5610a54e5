#include "../../core/philox.h"

#include "bind.h"

namespace lowrank {
namespace {

// out: uint16, the bits of the elements from 8 * group on.
void random(uint64_t seed, uint32_t step, uint32_t parameter, uint64_t group, Array out) {
  auto* bits = data<uint16_t>(out);
  const RandomStream stream{seed, step, parameter};
  for (py::ssize_t i = 0; i < out.size(); ++i)
    bits[i] = uint16_t(random16(random_group(stream, group + uint64_t(i / 8)), int(i % 8)));
}

}  // namespace

void bind_philox(py::module_& module) {
  module.def("random16", &random, py::arg("seed"), py::arg("step"), py::arg("parameter"), py::arg("group"), py::arg("out"));
}

}  // namespace lowrank
