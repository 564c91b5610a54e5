// The tiles of csrc/cpu/int8_gemm.cpp against core, number by number: built for one instruction set, the same bits.
#include "../../cpu/int8_gemm.cpp"
#include "check.h"

namespace lowrank {
namespace {

// Element (channel, k) of a source.
template <class T>
float element(const Int8Source& x, int64_t channel, int64_t k) {
  const auto* data = static_cast<const T*>(x.matrix.data);
  return to_float(x.columns ? data[k * x.matrix.stride + channel] : data[channel * x.matrix.stride + k]);
}

struct Codes {
  std::vector<int32_t> at;
  float scale;
};

template <class T>
Codes codes_of(const Int8Source& x, int64_t channel, int64_t group) {
  Codes codes;
  uint32_t largest = 0;
  const int64_t end = smaller(x.depth, (group + 1) * kGemmGroup);
  for (int64_t k = group * kGemmGroup; k < end; ++k) largest = std::max(largest, magnitude(element<T>(x, channel, k)));
  codes.scale = gemm_scale(largest);
  for (int64_t k = group * kGemmGroup; k < end; ++k)
    codes.at.push_back(int8_t(gemm_code(element<T>(x, channel, k), int8_inverse(codes.scale))));
  return codes;
}

template <class A, class B>
std::vector<float> product(const Int8Source& a, const Int8Source& b) {
  std::vector<float> out(a.channels * b.channels);
  for (int64_t group = 0; group * kGemmGroup < a.depth; ++group) {
    for (int64_t i = 0; i < a.channels; ++i) {
      const Codes row = codes_of<A>(a, i, group);
      for (int64_t j = 0; j < b.channels; ++j) {
        const Codes column = codes_of<B>(b, j, group);
        int32_t dot = 0;
        for (size_t k = 0; k < row.at.size(); ++k) dot += row.at[k] * column.at[k];
        float& sum = out[i * b.channels + j];
        sum = gemm_add(sum, row.scale, column.scale, dot);
      }
    }
  }
  return out;
}

// An operand with its memory.
struct Quantized {
  std::vector<uint8_t> codes;
  std::vector<float> scale;
  std::vector<int32_t> sum;
  Int8Operand operand;

  Quantized(const Int8Source& from, bool rows) : operand{nullptr, nullptr, nullptr, from.channels, from.depth} {
    const int64_t channels = operand.groups() * operand.padded();
    codes.resize(channels * operand.width()), scale.resize(channels), sum.resize(channels);
    operand.codes = codes.data(), operand.scale = scale.data(), operand.sum = rows ? sum.data() : nullptr;
    int8_gemm_table.quantize(from, operand, 0, operand.groups() * operand.blocks());
  }
};

void expect_same(const char* name, const char* what, const std::vector<float>& got, const std::vector<float>& want) {
  for (size_t i = 0; i < got.size(); ++i) {
    if (float_bits(got[i]) == float_bits(want[i]) || (std::isnan(got[i]) && std::isnan(want[i]))) continue;
    std::printf("%s, %s: element %zu is %g, not %g\n", name, what, i, double(got[i]), double(want[i]));
    ++failures;
    return;
  }
}

// Every way in which a product is made, of operands whose channels are columns or rows.
template <class A, class B>
void products(const char* name, DType a_type, DType b_type, int64_t p, int64_t q, int64_t depth, bool a_columns, bool b_columns) {
  auto a_values = random<A>(p * depth, 1);
  auto b_values = random<B>(q * depth, 2);
  if (p * depth > 700) a_values[700] = from_float<A>(INFINITY);
  std::fill_n(b_values.begin(), smaller(q * depth, 300), from_float<B>(0.0f));
  const Int8Source a{{a_type, a_values.data(), a_columns ? p : depth}, p, depth, a_columns};
  const Int8Source b{{b_type, b_values.data(), b_columns ? q : depth}, q, depth, b_columns};
  const auto want = product<A, B>(a, b);
  const Quantized rows(a, true), columns(b, false);

  std::vector<float> out(p * q, 9.0f);
  const int64_t blocks = columns.operand.blocks(), panels = (p + kInt8Rows - 1) / kInt8Rows;
  for (int64_t i = 0; b_columns && i < blocks; i += 2)
    int8_gemm_table.project_columns(rows.operand, b, out.data(), i, smaller(i + 2, blocks));
  if (b_columns) expect_same(name, "project_columns", out, want);
  std::fill(out.begin(), out.end(), 9.0f);
  for (int64_t i = 0; !a_columns && i < panels; i += 3)
    int8_gemm_table.project_rows(a, columns.operand, out.data(), i, smaller(i + 3, panels));
  if (!a_columns) expect_same(name, "project_rows", out, want);
  std::fill(out.begin(), out.end(), 9.0f);
  int8_gemm_table.back({rows.operand, columns.operand, {DType::f32, out.data(), q}, nullptr, nullptr, 0.0f, 1.0f}, 0, panels);
  expect_same(name, "back", out, want);
}

}  // namespace
}  // namespace lowrank

int main() {
  using namespace lowrank;
  products<float, float>("fp32", DType::f32, DType::f32, 70, 130, 600, true, true);
  products<float, float>("fp32, rows", DType::f32, DType::f32, 33, 65, 259, false, false);
  products<bf16, fp16>("bf16 and fp16", DType::bf16, DType::f16, 9, 17, 1023, false, true);
  products<fp16, bf16>("fp16 and bf16", DType::f16, DType::bf16, 64, 64, 1, true, false);
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures != 0;
}
