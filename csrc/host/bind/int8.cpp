#include "../../core/int8.h"

#include "coded.h"

namespace lowrank {
namespace {

// Returns how many groups have a new scale.
int64_t update(int threads, int vector, Array codes, Array scale, Array dense, const std::string& dtype, float alpha, float decay,
               uint64_t seed, uint32_t step, uint32_t parameter, uint64_t offset, int group_size) {
  const auto w = coded<Int8Matrix>(codes, scale, dense, group_size);
  void* values = data<void>(dense);
  alignas(16) uint16_t bits[kLargestGroup + 16];
  std::atomic<int64_t> rescaled = 0;
  each_group(threads, vector, dtype, w, dense.shape(0), [&](auto type, auto v, const auto& block, const auto& g) {
    const auto* x = static_cast<const typename decltype(type)::type*>(values) + g.element;
    const uint64_t first = offset + uint64_t(g.element);
    const bool is_new = update_group<decltype(v)::value>(block, w.codes + g.code, w.scale + g.index, x, g.n,
                                                         Int8Update{alpha, decay}, [&](const auto& mine) {
                                                           random_bits(mine, {seed, step, parameter}, first, g.n, bits);
                                                           return bits + first % 8;
                                                         });
    if (block.tid == 0) rescaled += is_new;
  });
  return rescaled;
}

}  // namespace

void bind_int8(py::module_& module) {
  module.def("quantize_int8", &quantize<Int8Matrix>, py::arg("threads"), py::arg("vector"), py::arg("dense"), py::arg("dtype"),
             py::arg("codes"), py::arg("scale"), py::arg("group_size"));
  module.def("dequantize_int8", &dequantize<Int8Matrix>, py::arg("threads"), py::arg("vector"), py::arg("codes"), py::arg("scale"),
             py::arg("dense"), py::arg("dtype"), py::arg("group_size"));
  module.def("update_int8", &update, py::arg("threads"), py::arg("vector"), py::arg("codes"), py::arg("scale"), py::arg("dense"),
             py::arg("dtype"), py::arg("alpha"), py::arg("decay"), py::arg("seed"), py::arg("step"), py::arg("parameter"),
             py::arg("offset"), py::arg("group_size"));
}

}  // namespace lowrank
