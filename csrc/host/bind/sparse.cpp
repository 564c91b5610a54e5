#include "../../core/rows.h"
#include "../../core/selection.h"
#include "bind.h"

namespace lowrank {
namespace {

void select_rows(int threads, const std::string& method, Array norms, uint64_t seed, uint32_t step, uint32_t parameter,
                 Array indices, Array scale) {
  const int64_t d = norms.size(), r = indices.size();
  const Method how = method == "top" ? Method::top : method == "sample" ? Method::sample : Method::sample_replace;
  std::vector<uint64_t> keys(d), shares(d);
  std::vector<int32_t> counts(d), draws(r);
  const RowSelection selection{how,
                               data<float>(norms),
                               d,
                               r,
                               keys.data(),
                               shares.data(),
                               counts.data(),
                               draws.data(),
                               data<int32_t>(indices),
                               data<float>(scale)};
  const RandomStream stream{seed, step, parameter};
  run_block(threads, [&](const auto& block) {
    if (how == Method::sample_replace) return select_by_draws(block, selection, stream);
    for (int64_t i = block.tid; i < d; i += std::decay_t<decltype(block)>::threads)
      selection.keys[i] = row_key(how, stream, selection.norms, i);
    block.sync();
    select_by_keys(block, selection);
  });
}

// One step as the GPU runs it: strips of 32 columns (left), or rows. Returns how many channels were left out.
int64_t grass_step(int threads, int vector, bool left, Array w, const std::string& w_dtype, Array g, const std::string& g_dtype,
                   Array indices, Array scale, Array m, Array v, Array ok, float grad_scale, const AdamStep& step) {
  constexpr int strip = 32;
  const int64_t high = w.shape(0), wide = w.shape(1), count = indices.size(), size = left ? high : wide;
  std::vector<uint32_t> owner(size, SelectedRows::kNobody);
  const int32_t* index = data<int32_t>(indices);
  for (int64_t j = count - 1; j >= 0; --j)
    if (index[j] >= 0 && index[j] < size) owner[index[j]] = uint32_t(j);
  const SelectedRows rows{index, data<float>(scale), owner.data(), count, size};
  auto* flags = data<uint8_t>(ok);
  std::atomic<int64_t> skipped = 0;
  dispatch(parse(w_dtype), [&](auto w_type) {
    dispatch(parse(g_dtype), [&](auto g_type) {
      using W = typename decltype(w_type)::type;
      using G = typename decltype(g_type)::type;
      const Grass<W, G> grass{data<W>(w), data<G>(g), data<float>(m), data<float>(v), wide, rows, grad_scale, step};
      run_block(threads, [&](const auto& block) {
        for (int64_t i = 0; !left && i < high; ++i) {
          const bool good = vector > 1 ? grass_row<8>(block, grass, i) : grass_row<1>(block, grass, i);
          if (block.tid == 0) skipped += !good;
        }
        for (int64_t c = 0; left && c < wide; c += strip)
          skipped += vector > 1 ? grass_columns<strip, 4>(block, grass, flags, c, strip)
                                : grass_columns<strip, 1>(block, grass, flags, c, int(wide - c < strip ? wide - c : strip));
        block.sync();
        for (int64_t i = 0; left && i < high; ++i) {
          if (owner[i] != SelectedRows::kNobody) continue;
          vector > 1 ? decay_row<8>(block, grass.w + i * wide, flags, wide, step.decay)
                     : decay_row<1>(block, grass.w + i * wide, flags, wide, step.decay);
        }
      });
    });
  });
  return skipped;
}

void gather_one_row(int threads, int vector, Array from, const std::string& dtype, Array to, float scale) {
  dispatch(parse(dtype), [&](auto type) {
    const auto* g = data<typename decltype(type)::type>(from);
    run_block(threads, [&](const auto& block) {
      vector > 1 ? gather_row<4>(block, g, data<float>(to), from.size(), scale)
                 : gather_row<1>(block, g, data<float>(to), from.size(), scale);
    });
  });
}

void add_to_row(int threads, int vector, Array w, const std::string& dtype, Array x, float alpha) {
  dispatch(parse(dtype), [&](auto type) {
    auto* weights = data<typename decltype(type)::type>(w);
    run_block(threads, [&](const auto& block) {
      vector > 1 ? add_row<4>(block, weights, data<float>(x), w.size(), alpha)
                 : add_row<1>(block, weights, data<float>(x), w.size(), alpha);
    });
  });
}

}  // namespace

void bind_sparse(py::module_& module) {
  module.def("select_rows", &select_rows, py::arg("threads"), py::arg("method"), py::arg("norms"), py::arg("seed"), py::arg("step"),
             py::arg("parameter"), py::arg("indices"), py::arg("scale"));
  module.def("grass_step", &grass_step, py::arg("threads"), py::arg("vector"), py::arg("left"), py::arg("w"), py::arg("w_dtype"),
             py::arg("g"), py::arg("g_dtype"), py::arg("indices"), py::arg("scale"), py::arg("m"), py::arg("v"), py::arg("ok"),
             py::arg("grad_scale"), py::arg("step"));
  module.def("gather_row", &gather_one_row, py::arg("threads"), py::arg("vector"), py::arg("source"), py::arg("dtype"),
             py::arg("out"), py::arg("scale"));
  module.def("add_row", &add_to_row, py::arg("threads"), py::arg("vector"), py::arg("w"), py::arg("dtype"), py::arg("x"),
             py::arg("alpha"));
}

}  // namespace lowrank
