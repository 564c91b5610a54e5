// torch.ops.lowrank on the CPU: selecting, gathering and scattering rows, and steps on them.
#include "../../cpu/sparse.h"

#include "../step.h"
#include "hyper.h"

namespace lowrank {
namespace {

const float* scale_data(const std::optional<Tensor>& scale) { return scale ? data<float>(*scale) : nullptr; }

Matrix matrix_of(const Tensor& t) { return {storage(t), data<void>(t), t.size(1)}; }

void expect_index(const char* op, int64_t j, int32_t index, int64_t size) {
  if (index < 0 || index >= size) fail(op, "indices[", j, "] must be in [0, ", size, "), got ", index);
}

// owner[i]: the j with indices[j] == i, or kNobody. Every index must be in range, and no other's.
std::vector<uint32_t> owners(const char* op, const Tensor& indices, int64_t size) {
  const int32_t* index = data<int32_t>(indices);
  std::vector<uint32_t> owner(size, SelectedRows::kNobody);
  for (int64_t j = 0; j < indices.size(0); ++j) {
    expect_index(op, j, index[j], size);
    uint32_t& first = owner[index[j]];
    if (first != SelectedRows::kNobody) fail(op, "indices[", j, "] = ", index[j], " repeats indices[", first, "]");
    first = uint32_t(j);
  }
  return owner;
}

std::tuple<Tensor, Tensor> select_rows(const Tensor& norms, int64_t r, std::string method, int64_t seed, int64_t step,
                                       int64_t parameter) {
  const Method how = check_select_rows(norms, r, method);
  const int64_t d = norms.size(0);
  const Tensor indices = empty({r}, aoti_torch_dtype_int32()), scale = empty({r});
  const bool draws = how == Method::sample_replace;
  std::vector<uint64_t> keys(d), shares(draws ? d : 0);
  std::vector<int32_t> counts(draws ? d : 0), drawn(draws ? r : 0);
  const RowSelection selection{how,
                               data<float>(norms),
                               d,
                               r,
                               keys.data(),
                               shares.data(),
                               counts.data(),
                               drawn.data(),
                               data<int32_t>(indices),
                               data<float>(scale)};
  const RandomStream stream{uint64_t(seed), uint32_t(step), uint32_t(parameter)};
  if (!draws) parallel(d, 16, [&](int64_t begin, int64_t end) { sparse_kernels().keys(selection, stream, begin, end); });
  sparse_kernels().select(selection, stream);
  return {indices, scale};
}

Tensor gather_rows(const Tensor& grad, const Tensor& indices, const std::optional<Tensor>& scale, bool left) {
  check_gather_rows(grad, indices, scale);
  const int64_t m = grad.size(0), n = grad.size(1), r = indices.size(0), size = left ? m : n;
  for (int64_t j = 0; j < r; ++j) expect_index("gather_rows", j, data<int32_t>(indices)[j], size);
  const Tensor out = empty(selected_shape(grad, indices, left));
  const SelectedRows rows{data<int32_t>(indices), scale_data(scale), nullptr, r, size};
  const Matrix g = matrix_of(grad);
  float* x = data<float>(out);
  parallel(left ? r : m, left ? n : r, [&](int64_t begin, int64_t end) {
    left ? sparse_kernels().gather_rows(g, rows, x, n, begin, end) : sparse_kernels().gather_columns(g, rows, x, begin, end);
  });
  return out;
}

void scatter_add_rows(const Tensor& param, const Tensor& low_rank, const Tensor& indices, const std::optional<Tensor>& scale,
                      double alpha, bool left) {
  check_scatter_add_rows(param, low_rank, indices, scale, left);
  const int64_t m = param.size(0), n = param.size(1), r = indices.size(0), size = left ? m : n;
  const auto owner = owners("scatter_add_rows_", indices, size);
  const SelectedRows rows{data<int32_t>(indices), scale_data(scale), owner.data(), r, size};
  const Matrix w = matrix_of(param);
  const float* x = data<float>(low_rank);
  parallel(left ? r : m, left ? n : r, [&](int64_t begin, int64_t end) {
    left ? sparse_kernels().add_rows(w, rows, x, n, float(alpha), begin, end)
         : sparse_kernels().add_columns(w, rows, x, float(alpha), begin, end);
  });
}

// One step; returns the number of weights left out.
int64_t run(const Tensor& param, const Tensor& grad, const Tensor& indices, const std::optional<Tensor>& row_scale,
            const std::vector<uint32_t>& owner, const Tensor& exp_avg, const Tensor& exp_avg_sq, const AdamStep& step,
            const Rounding& rounding, float grad_scale, bool left) {
  const int64_t m = param.size(0), n = param.size(1), r = indices.size(0);
  const bool decays = step.decay != 1.0f;
  std::vector<uint8_t> ok(left && decays ? n : 0);
  const SelectedRows rows{data<int32_t>(indices), scale_data(row_scale), owner.data(), r, left ? m : n};
  const GrassStep grass{matrix_of(param),
                        matrix_of(grad),
                        data<float>(exp_avg),
                        data<float>(exp_avg_sq),
                        n,
                        rows,
                        grad_scale,
                        step,
                        ok.empty() ? nullptr : ok.data(),
                        rounding};
  std::atomic<int64_t> skipped = 0;
  parallel(left ? n : m, left || !decays ? r : n, [&](int64_t begin, int64_t end) {
    skipped += (left ? sparse_kernels().grass_columns : sparse_kernels().grass_rows)(grass, begin, end);
  });
  if (left && decays) parallel(m, n, [&](int64_t begin, int64_t end) { sparse_kernels().decay_rows(grass, begin, end); });
  return skipped * (left ? m : n);
}

void step_rows(const Tensors& weights, const Tensors& gradients, const Tensors& indices, const Tensors& row_scales,
               const Tensors& exp_avgs, const Tensors& exp_avg_sqs, const Tensors& steps, const Tensor& lr, double beta1,
               double beta2, double eps, double weight_decay, double scale, bool left, bool advance, bool stochastic, int64_t seed,
               const std::vector<int64_t>& parameters, const std::vector<int64_t>& offsets, const std::optional<Tensor>& grad_scale,
               const std::optional<Tensor>& found_inf, const std::optional<Tensor>& skipped, const std::string& op) {
  const Guards guards{grad_scale, found_inf, skipped};
  const RowLists lists{weights, gradients, indices, row_scales, exp_avgs, exp_avg_sqs, steps};
  const Draws draws{stochastic, seed, parameters, offsets};
  check_rows(op, lists, lr, left, advance, draws, guards);
  std::vector<std::vector<uint32_t>> owner;
  Where where(op, weights.size());
  for (size_t i = 0; i < weights.size(); ++i) owner.push_back(owners(where.at(i), indices[i], weights[i].size(left ? 0 : 1)));
  if (is_no_op(guards)) return;
  const Hyper hyper{beta1, beta2, eps, weight_decay, scale};
  const double rate = read_number(lr);
  for (size_t i = 0; i < weights.size(); ++i) {
    const double count = count_of(steps[i], advance);
    count_skipped(guards, run(weights[i], gradients[i], indices[i], lists.scale_at(i), owner[i], exp_avgs[i], exp_avg_sqs[i],
                              hyper.at(count, rate), rounding_of(draws, i, count), grad_scale_of(guards), left));
  }
}

STABLE_TORCH_LIBRARY_IMPL(lowrank, CPU, library) {
  library.impl("select_rows", TORCH_BOX(&select_rows));
  library.impl("gather_rows", TORCH_BOX(&gather_rows));
  library.impl("scatter_add_rows_", TORCH_BOX(&scatter_add_rows));
  library.impl("step.rows", TORCH_BOX(&step_rows));
}

}  // namespace
}  // namespace lowrank
