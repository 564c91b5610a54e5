#include "../../core/int4.h"

#include "bind.h"

namespace lowrank {
namespace {

// f(piece) for all groups of up to 32 vectors.
template <class F>
void for_pieces(const Int4& basis, const F& f) {
  for (int64_t vector = 0; vector < basis.r; vector += kVectors) {
    for (int64_t group = 0; group < basis.groups(); ++group) f(int4_piece(basis, vector, group));
  }
}

Int4 as_int4(Array packed, Array scale, Array offset, int64_t d, int group_size) {
  return {data<uint8_t>(packed), data<float>(scale), data<float>(offset), d, packed.shape(0), group_size};
}

void quantize_int4(int threads, Array basis, const std::string& dtype, Array packed, Array scale, Array offset, int group_size) {
  const Int4 to = as_int4(packed, scale, offset, basis.shape(0), group_size);
  dispatch(parse(dtype), [&](auto type) {
    const auto* from = data<typename decltype(type)::type>(basis);
    run_block(threads, [&](const auto& block) {
      for_pieces(to, [&](const Int4Piece& p) {
        quantize_int4_group(block, from + p.entry * to.r + p.vector, to.r, p.at, p.entries, p.vectors);
      });
    });
  });
}

void dequantize_int4(int threads, Array packed, Array scale, Array offset, int group_size, Array basis) {
  const Int4 from = as_int4(packed, scale, offset, basis.shape(0), group_size);
  float* to = data<float>(basis);
  run_block(threads, [&](const auto& block) {
    for_pieces(from, [&](const Int4Piece& p) {
      dequantize_int4_group(block, p.at, to + p.entry * from.r + p.vector, from.r, p.entries, p.vectors);
    });
  });
}

}  // namespace

void bind_int4(py::module_& module) {
  module.def("quantize_int4", &quantize_int4, py::arg("threads"), py::arg("basis"), py::arg("dtype"), py::arg("packed"),
             py::arg("scale"), py::arg("offset"), py::arg("group_size"));
  module.def("dequantize_int4", &dequantize_int4, py::arg("threads"), py::arg("packed"), py::arg("scale"), py::arg("offset"),
             py::arg("group_size"), py::arg("basis"));
}

}  // namespace lowrank
