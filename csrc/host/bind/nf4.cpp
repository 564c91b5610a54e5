#include "../../core/nf4.h"

#include "coded.h"

namespace lowrank {

void bind_nf4(py::module_& module) {
  module.def("quantize_nf4", &quantize<Nf4Matrix>, py::arg("threads"), py::arg("vector"), py::arg("dense"), py::arg("dtype"),
             py::arg("packed"), py::arg("absmax"), py::arg("group_size"));
  module.def("dequantize_nf4", &dequantize<Nf4Matrix>, py::arg("threads"), py::arg("vector"), py::arg("packed"), py::arg("absmax"),
             py::arg("dense"), py::arg("dtype"), py::arg("group_size"));
}

}  // namespace lowrank
