#include "../../core/residual.h"

#include "bind.h"

namespace lowrank {
namespace {

int64_t ratio(int threads, bool columns, Array r, Array m, Array v, Array x, Array r_squares, Array n_squares, Array norms,
              Array ok, float grad_scale, const AdamStep& step) {
  const int64_t high = r.shape(0), wide = r.shape(1);
  float *r_data = data<float>(r), *m_data = data<float>(m), *v_data = data<float>(v), *x_data = data<float>(x);
  const ChannelSquares squares{data<float>(r_squares), data<float>(n_squares), data<float>(norms), data<uint8_t>(ok)};
  std::atomic<int64_t> skipped = 0;
  run_block(threads, [&](const auto& block) {
    if (columns) {
      for (int64_t c = 0; c < wide; c += kLanes)
        skipped += ratio_columns(block, r_data, m_data, v_data, x_data, squares, c, high,
                                 int(wide - c < kLanes ? wide - c : kLanes), wide, grad_scale, step);
    } else {
      for (int64_t i = 0; i < high; ++i) {
        const int64_t at = i * wide;
        const bool good = ratio_row(block, r_data + at, m_data + at, v_data + at, x_data + at, squares, i, wide, grad_scale, step);
        if (block.tid == 0) skipped += !good;
      }
    }
  });
  return skipped;
}

// coefficients: one a column, or one a row.
void move(int threads, bool columns, bool sign, Array w, const std::string& w_dtype, Array g, const std::string& g_dtype,
          Array back, Array inside, Array coefficients, float decay, float alpha) {
  const int64_t high = w.shape(0), wide = w.shape(1);
  const float *c = data<float>(coefficients), *b = data<float>(back), *in = data<float>(inside);
  dispatch(parse(w_dtype), [&](auto w_type) {
    dispatch(parse(g_dtype), [&](auto g_type) {
      auto* weights = data<typename decltype(w_type)::type>(w);
      const auto* grads = data<typename decltype(g_type)::type>(g);
      run_block(threads, [&](const auto& block) {
        for (int64_t i = 0; i < high; ++i)
          move_row(block, weights + i * wide, grads + i * wide, b + i * wide, sign ? in + i * wide : nullptr, columns ? c : nullptr,
                   columns ? 0.0f : c[i], wide, decay, alpha);
      });
    });
  });
}

}  // namespace

void bind_residual(py::module_& module) {
  module.def("ratio", &ratio, py::arg("threads"), py::arg("columns"), py::arg("r"), py::arg("m"), py::arg("v"), py::arg("x"),
             py::arg("r_squares"), py::arg("n_squares"), py::arg("norms"), py::arg("ok"), py::arg("grad_scale"), py::arg("step"));
  module.def("move", &move, py::arg("threads"), py::arg("columns"), py::arg("sign"), py::arg("w"), py::arg("w_dtype"), py::arg("g"),
             py::arg("g_dtype"), py::arg("back"), py::arg("inside"), py::arg("coefficients"), py::arg("decay"), py::arg("alpha"));
}

}  // namespace lowrank
