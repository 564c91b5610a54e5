#include "../../core/adam_8bit.h"
#include "bind.h"

namespace lowrank {
namespace {

const Codebook<true> kSigned = make_codebook<true>();
const Codebook<false> kUnsigned = make_codebook<false>();

// values: float32 (256,), bins: uint32 (kBins,).
void codebook(bool is_signed, Array values, Array bins) {
  const auto copy = [&](const auto& book) {
    std::copy_n(book.value, 256, data<float>(values));
    std::copy_n(book.bin, kBins, data<uint32_t>(bins));
  };
  is_signed ? copy(kSigned) : copy(kUnsigned);
}

// Calls f(block, vector, i, its place) for each block; eight elements at a time where it can be taken so.
template <class F>
void for_blocks(int threads, int vector, const RowBlocks& blocks, const F& f) {
  run_block(threads, [&](const auto& block) {
    constexpr int wide = kOwned<std::decay_t<decltype(block)>> % 8 == 0 ? 8 : 1;
    for (int64_t i = 0; i < block_count(blocks); ++i) {
      const BlockAt at = block_at(blocks, i);
      if (vector == 8 && in_vectors<8>(at)) {
        f(block, std::integral_constant<int, wide>{}, i, at);
      } else {
        f(block, std::integral_constant<int, 1>{}, i, at);
      }
    }
  });
}

RowBlocks flat(const Array& x) { return {1, int64_t(x.size())}; }

RowBlocks by_row(const Array& x) { return {int64_t(x.shape(0)), int64_t(x.shape(1))}; }

// The blocks of x that these are the scales of.
RowBlocks blocks_of(const Array& x, const Array& absmax) { return absmax.ndim() == 2 ? by_row(x) : flat(x); }

void quantize(int threads, int vector, Array x, const std::string& dtype, bool is_signed, Array codes, Array absmax) {
  auto* out = data<uint8_t>(codes);
  auto* most = data<float>(absmax);
  dispatch(parse(dtype), [&](auto type) {
    const auto* values = data<typename decltype(type)::type>(x);
    for_blocks(threads, vector, blocks_of(x, absmax), [&](const auto& block, auto v, int64_t i, const BlockAt& at) {
      is_signed ? quantize_block<v>(block, kSigned, values + at.first, out + at.first, most + i, at.n)
                : quantize_block<v>(block, kUnsigned, values + at.first, out + at.first, most + i, at.n);
    });
  });
}

void dequantize(int threads, int vector, Array codes, Array absmax, bool is_signed, Array x) {
  const auto* in = data<uint8_t>(codes);
  const auto* most = data<float>(absmax);
  auto* out = data<float>(x);
  for_blocks(threads, vector, blocks_of(x, absmax), [&](const auto& block, auto v, int64_t i, const BlockAt& at) {
    is_signed ? dequantize_block<v>(block, kSigned, in + at.first, most[i], out + at.first, at.n)
              : dequantize_block<v>(block, kUnsigned, in + at.first, most[i], out + at.first, at.n);
  });
}

Moments8bit moments(Array m, Array v, Array m_absmax, Array v_absmax) {
  return {data<uint8_t>(m), data<uint8_t>(v), data<float>(m_absmax), data<float>(v_absmax)};
}

int64_t adam(int threads, int vector, Array w, const std::string& w_dtype, Array g, const std::string& g_dtype, Array m, Array v,
             Array m_absmax, Array v_absmax, float grad_scale, const AdamStep& step) {
  const Moments8bit stored = moments(m, v, m_absmax, v_absmax);
  std::atomic<int64_t> skipped = 0;
  dispatch(parse(w_dtype), [&](auto w_type) {
    dispatch(parse(g_dtype), [&](auto g_type) {
      using W = typename decltype(w_type)::type;
      auto* weights = data<W>(w);
      const auto* grads = data<typename decltype(g_type)::type>(g);
      for_blocks(threads, vector, flat(w), [&](const auto& block, auto wide, int64_t i, const BlockAt& at) {
        skipped += adam_8bit_block<wide>(block, Codebooks{kSigned, kUnsigned}, grads + at.first, IntoWeights<W>{weights + at.first},
                                         at_block(stored, i, at.first), at.n, grad_scale, step, EveryChannel{});
      });
    });
  });
  return skipped;
}

void low_rank_adam(int threads, int vector, bool left, Array r, Array m, Array v, Array m_absmax, Array v_absmax, Array x, Array ok,
                   float grad_scale, const AdamStep& step) {
  const Moments8bit stored = moments(m, v, m_absmax, v_absmax);
  const auto* grads = data<float>(r);
  auto* updates = data<float>(x);
  auto* flags = data<uint8_t>(ok);
  for_blocks(threads, vector, by_row(r), [&](const auto& block, auto wide, int64_t, const BlockAt& at) {
    mark_channels<wide>(block, grads, flags, at, left, grad_scale);
  });
  for_blocks(threads, vector, by_row(r), [&](const auto& block, auto wide, int64_t i, const BlockAt& at) {
    adam_8bit_block<wide>(block, Codebooks{kSigned, kUnsigned}, grads + at.first, IntoUpdate<float>{updates + at.first},
                          at_block(stored, i, at.first), at.n, grad_scale, step, channel_flags(flags, at, left));
  });
}

}  // namespace

void bind_blockwise(py::module_& module) {
  module.attr("FIRST_BIN") = kFirstBin;
  module.attr("BINS") = kBins;
  module.def("codebook", &codebook, py::arg("signed"), py::arg("values"), py::arg("bins"));
  module.def("quantize_blockwise", &quantize, py::arg("threads"), py::arg("vector"), py::arg("x"), py::arg("dtype"),
             py::arg("signed"), py::arg("codes"), py::arg("absmax"));
  module.def("dequantize_blockwise", &dequantize, py::arg("threads"), py::arg("vector"), py::arg("codes"), py::arg("absmax"),
             py::arg("signed"), py::arg("x"));
  module.def("adam_8bit", &adam, py::arg("threads"), py::arg("vector"), py::arg("w"), py::arg("w_dtype"), py::arg("g"),
             py::arg("g_dtype"), py::arg("m"), py::arg("v"), py::arg("m_absmax"), py::arg("v_absmax"), py::arg("grad_scale"),
             py::arg("step"));
  module.def("low_rank_adam_8bit", &low_rank_adam, py::arg("threads"), py::arg("vector"), py::arg("left"), py::arg("r"),
             py::arg("m"), py::arg("v"), py::arg("m_absmax"), py::arg("v_absmax"), py::arg("x"), py::arg("ok"),
             py::arg("grad_scale"), py::arg("step"));
}

}  // namespace lowrank
