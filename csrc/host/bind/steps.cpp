#include "../../core/adamw.h"
#include "../../core/low_rank.h"
#include "bind.h"

namespace lowrank {
namespace {

int64_t adamw(int threads, int vector, Array w, const std::string& w_dtype, Array g, const std::string& g_dtype, Array m, Array v,
              float grad_scale, const AdamStep& step) {
  std::atomic<int64_t> skipped = 0;
  dispatch(parse(w_dtype), [&](auto w_type) {
    dispatch(parse(g_dtype), [&](auto g_type) {
      auto* weights = data<typename decltype(w_type)::type>(w);
      const auto* grads = data<typename decltype(g_type)::type>(g);
      float *m_data = data<float>(m), *v_data = data<float>(v);
      const int n = int(w.size());
      run_block(threads, [&](const auto& block) {
        skipped += vector == 8 ? adamw_chunk<8>(block, weights, grads, m_data, v_data, n, grad_scale, step)
                               : adamw_chunk<1>(block, weights, grads, m_data, v_data, n, grad_scale, step);
      });
    });
  });
  return skipped;
}

int64_t low_rank_adam(int threads, bool columns, Array r, Array m, Array v, Array x, Array ok, float grad_scale,
                      const AdamStep& step) {
  const int64_t high = r.shape(0), wide = r.shape(1);
  float *r_data = data<float>(r), *m_data = data<float>(m), *v_data = data<float>(v), *x_data = data<float>(x);
  auto* flags = data<uint8_t>(ok);
  std::atomic<int64_t> skipped = 0;
  run_block(threads, [&](const auto& block) {
    if (columns) {
      for (int64_t c = 0; c < wide; c += kLanes)
        skipped += adam_columns(block, r_data + c, m_data + c, v_data + c, x_data + c, flags + c, high,
                                int(wide - c < kLanes ? wide - c : kLanes), wide, grad_scale, step);
    } else {
      for (int64_t i = 0; i < high; ++i) {
        const int64_t at = i * wide;
        const bool good = adam_row(block, r_data + at, m_data + at, v_data + at, x_data + at, wide, grad_scale, step);
        if (block.tid == 0) flags[i] = good, skipped += !good;
      }
    }
  });
  return skipped;
}

}  // namespace

void bind_steps(py::module_& module) {
  py::class_<AdamStep>(module, "AdamStep")
      .def(py::init([](double beta1, double beta2, double eps, double weight_decay, double scale, double lr, double step) {
             return adam_step(beta1, beta2, eps, weight_decay, scale, lr, step);
           }),
           py::kw_only(), py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"), py::arg("scale"),
           py::arg("lr"), py::arg("step"));
  module.def("adamw", &adamw, py::arg("threads"), py::arg("vector"), py::arg("w"), py::arg("w_dtype"), py::arg("g"),
             py::arg("g_dtype"), py::arg("m"), py::arg("v"), py::arg("grad_scale"), py::arg("step"));
  module.def("low_rank_adam", &low_rank_adam, py::arg("threads"), py::arg("columns"), py::arg("r"), py::arg("m"), py::arg("v"),
             py::arg("x"), py::arg("ok"), py::arg("grad_scale"), py::arg("step"));
}

}  // namespace lowrank
