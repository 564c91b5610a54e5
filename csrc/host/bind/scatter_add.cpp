#include "../../core/scatter_add.h"

#include "bind.h"

namespace lowrank {
namespace {

// The columns [first, last) of all rows of W, by tiles of so many columns.
void merge(int threads, Array product, float scale, Array values, const std::string& values_dtype, Array columns, Array w,
           const std::string& dtype, int64_t wide) {
  const int64_t m = w.shape(0), n = w.shape(1), k = columns.shape(1);
  dispatch(parse(values_dtype), [&](auto v) {
    dispatch(parse(dtype), [&](auto type) {
      const auto* x = data<typename decltype(v)::type>(values);
      auto* out = data<typename decltype(type)::type>(w);
      run_block(threads, [&](const auto& block) {
        for (int64_t i = 0; i < m; ++i)
          for (int64_t j = 0; j < n; j += wide) {
            const int32_t* own = data<int32_t>(columns) + i * k;
            const int64_t end = j + wide < n ? j + wide : n, first = first_at_least(own, k, j), last = first_at_least(own, k, end);
            merge_row(block, data<float>(product) + i * n + j, scale, x + i * k + first, own + first, last - first, j,
                      out + i * n + j, end - j);
          }
      });
    });
  });
}

int64_t first_wrong(Array columns, int64_t n) { return first_wrong_column(data<int32_t>(columns), columns.size(), n); }

}  // namespace

void bind_scatter_add(py::module_& module) {
  module.def("merge_row", &merge, py::arg("threads"), py::arg("product"), py::arg("scale"), py::arg("values"),
             py::arg("values_dtype"), py::arg("columns"), py::arg("w"), py::arg("dtype"), py::arg("wide"));
  module.def("first_wrong_column", &first_wrong, py::arg("columns"), py::arg("n"));
}

}  // namespace lowrank
