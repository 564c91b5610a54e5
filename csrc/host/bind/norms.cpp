#include "../../core/norms.h"

#include "bind.h"

namespace lowrank {
namespace {

void channel_norms(int threads, int vector, bool columns, Array g, const std::string& dtype, Array norms) {
  const int64_t high = g.shape(0), wide = g.shape(1);
  float* out = data<float>(norms);
  dispatch(parse(dtype), [&](auto type) {
    const auto* matrix = data<typename decltype(type)::type>(g);
    run_block(threads, [&](const auto& block) {
      constexpr int eight = kOwned<std::decay_t<decltype(block)>> % 8 == 0 ? 8 : 1;
      if (columns && vector == 8 && wide % kColumns == 0) {
        for (int64_t c = 0; c < wide; c += kColumns) column_tile_norms<eight>(block, matrix + c, out + c, high, wide);
      } else if (columns) {
        for (int64_t c = 0; c < wide; c += kColumns)
          column_norms<1>(block, matrix + c, out + c, high, int(wide - c < kColumns ? wide - c : kColumns), wide);
      } else {
        for (int64_t i = 0; i < high; ++i) {
          const float norm =
              vector == 8 ? row_norm<eight>(block, matrix + i * wide, wide) : row_norm<1>(block, matrix + i * wide, wide);
          if (block.tid == 0) out[i] = norm;
        }
      }
    });
  });
}

}  // namespace

void bind_norms(py::module_& module) {
  module.def("channel_norms", &channel_norms, py::arg("threads"), py::arg("vector"), py::arg("columns"), py::arg("g"),
             py::arg("dtype"), py::arg("norms"));
}

}  // namespace lowrank
