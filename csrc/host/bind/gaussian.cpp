#include "../../core/gaussian.h"

#include "bind.h"

namespace lowrank {
namespace {

// out: rows [first, first + out's rows) of the basis.
void basis(int threads, int64_t seed, int64_t step, int64_t parameter, int64_t first, Array out, const std::string& dtype) {
  const int64_t rows = out.shape(0), rank = out.shape(1), last = first + rows;
  const GaussianBasis b = gaussian_basis(seed, step, parameter, rank);
  dispatch(parse(dtype), [&](auto type) {
    auto* to = data<typename decltype(type)::type>(out);
    run_block(threads, [&](const auto& block) {
      for (int64_t group = first / kGroup; group * kGroup < last; ++group)
        for (int64_t column = 0; column < rank; column += kWide)
          gaussian_rows<PhiloxWords>(block, to + column, rank, group, column, int(rank - column < kWide ? rank - column : kWide),
                                     first, last, b);
    });
  });
}

}  // namespace

void bind_gaussian(py::module_& module) {
  module.def("gaussian_basis", &basis, py::arg("threads"), py::arg("seed"), py::arg("step"), py::arg("parameter"), py::arg("first"),
             py::arg("out"), py::arg("dtype"));
}

}  // namespace lowrank
