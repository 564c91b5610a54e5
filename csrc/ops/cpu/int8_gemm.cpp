#include "int8_gemm.h"

#include "../../cpu/int8_gemm.h"

namespace lowrank {
namespace {

// The columns of t, or its rows, as channels.
Int8Source source_of(const Tensor& t, bool columns) {
  const int64_t high = t.size(0), wide = t.size(1);
  return {{storage(t), data<void>(t), wide}, columns ? wide : high, columns ? high : wide, columns};
}

// The source quantised, as the rows of a product or its columns.
Int8Operand quantized(const Int8Source& from, bool rows, Scratch& scratch) {
  Int8Operand to{nullptr, nullptr, nullptr, from.channels, from.depth};
  const int64_t parts = to.groups() * to.blocks(), channels = parts * kInt8Block;
  auto* memory = data<char>(scratch.matrix(channels, to.width() / 4 + (rows ? 2 : 1)));
  to.codes = reinterpret_cast<uint8_t*>(memory);
  to.scale = reinterpret_cast<float*>(memory + channels * to.width());
  to.sum = rows ? reinterpret_cast<int32_t*>(to.scale + channels) : nullptr;
  parallel(parts, kInt8Block * to.width(), [&](int64_t begin, int64_t end) { int8_gemm_kernels().quantize(from, to, begin, end); });
  return to;
}

}  // namespace

void project_int8_gemm(const Tensor& r, const Tensor& grad, const Tensor& basis, bool left, Workspace& work) {
  float* out = data<float>(r);
  if (grad.numel() == 0) {
    std::fill_n(out, r.numel(), 0.0f);
    return;
  }
  const Int8Operand b = quantized(source_of(basis, true), left, work.basis);
  const Int8Source g = source_of(grad, left);
  if (left) {
    parallel((g.channels + kInt8Block - 1) / kInt8Block, kInt8Block * g.depth,
             [&](int64_t begin, int64_t end) { int8_gemm_kernels().project_columns(b, g, out, begin, end); });
  } else {
    parallel((g.channels + kInt8Rows - 1) / kInt8Rows, kInt8Rows * g.depth,
             [&](int64_t begin, int64_t end) { int8_gemm_kernels().project_rows(g, b, out, begin, end); });
  }
}

void back_project_int8_gemm(const Tensor& param, const Tensor& x, const Tensor& basis, bool left, double beta, double alpha,
                            const uint8_t* ok, const Rounding& rounding, Workspace& work) {
  if (param.numel() == 0) return;
  const Int8Source b = source_of(basis, false), update = source_of(x, left);
  const Int8Back back{quantized(left ? b : update, true, work.basis),
                      quantized(left ? update : b, false, work.tile),
                      {storage(param), data<void>(param), param.size(1)},
                      left ? nullptr : ok,
                      left ? ok : nullptr,
                      float(beta),
                      float(alpha),
                      rounding};
  parallel((param.size(0) + kInt8Rows - 1) / kInt8Rows, kInt8Rows * param.size(1),
           [&](int64_t begin, int64_t end) { int8_gemm_kernels().back(back, begin, end); });
}

}  // namespace lowrank
