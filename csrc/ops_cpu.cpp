// torch.ops.lowrank on the CPU: check, unpack, run. Products are torch's own GEMMs, through its C shims.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <atomic>

#include "check.h"
#include "cpu/kernels.h"

namespace lowrank {
namespace {

// Elements that are worth a thread.
constexpr int64_t kGrain = 1 << 15;
// Storage other than fp32 passes through fp32 in tiles of 4 MiB.
constexpr int64_t kTileSide = 1024, kTileElements = kTileSide * kTileSide;

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

Tensor empty(const Shape& shape) { return lowrank::empty(shape, Place{aoti_torch_device_type_cpu(), 0}); }

// A view of rows x columns of t's memory; `offset` counts elements from t's first.
Tensor view(const Tensor& t, int64_t offset, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
  const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, offset, &out));
  return Tensor(out);
}

// Part of a contiguous matrix, and its transpose.
Tensor part(const Tensor& t, int64_t row, int64_t column, int64_t rows, int64_t columns) {
  return view(t, row * t.size(1) + column, rows, columns, t.size(1), 1);
}

Tensor transposed(const Tensor& t, int64_t row, int64_t rows) {
  return view(t, row * t.size(1), t.size(1), rows, 1, t.size(1));
}

// Memory for an fp32 matrix that is reused from product to product.
class Scratch {
 public:
  Tensor matrix(int64_t rows, int64_t columns) {
    if (!buffer_ || buffer_->numel() < rows * columns) buffer_ = empty({rows * columns});
    return view(*buffer_, 0, rows, columns, columns, 1);
  }

 private:
  std::optional<Tensor> buffer_;
};

struct Workspace {
  Scratch low_rank, basis, tile;
};

// out <- a b, or out + a b
void multiply(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate = false) {
  if (accumulate) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1, 1));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  }
}

// Calls f(begin, end) on parts of [0, n), one unit of which is `work` elements.
template <class F>
void parallel(int64_t n, int64_t work, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work));
  if (n > grain) {
    torch::stable::parallel_for(0, n, grain, f);
  } else if (n > 0) {
    f(0, n);
  }
}

// Calls f(row, column, rows, columns) on tiles of an m x n matrix.
template <class F>
void for_tiles(int64_t m, int64_t n, const F& f) {
  if (m == 0 || n == 0) return;
  const int64_t high = std::min(m, kTileSide), wide = std::min(n, kTileElements / high);
  for (int64_t j = 0; j < n; j += wide)
    for (int64_t i = 0; i < m; i += high) f(i, j, std::min(high, m - i), std::min(wide, n - j));
}

Tensor widened(const Tensor& t, int64_t row, int64_t column, int64_t rows, int64_t columns, Scratch& scratch) {
  const int64_t width = t.size(1);
  const Matrix from{storage(t), data<char>(t) + (row * width + column) * int64_t(t.element_size()), width};
  const Tensor out = scratch.matrix(rows, columns);
  float* to = data<float>(out);
  parallel(rows, columns, [&](int64_t begin, int64_t end) { kernels().widen(from, to, columns, begin, end); });
  return out;
}

Tensor as_fp32(const Tensor& t, Scratch& scratch) {
  return storage(t) == DType::f32 ? t : widened(t, 0, 0, t.size(0), t.size(1), scratch);
}

// r <- project(grad); basis in fp32.
void project_into(const Tensor& r, const Tensor& grad, const Tensor& basis, bool left, Scratch& scratch) {
  if (grad.numel() == 0) {
    std::fill_n(data<float>(r), r.numel(), 0.0f);
  } else if (storage(grad) == DType::f32) {
    left ? multiply(r, transposed(basis, 0, basis.size(0)), grad) : multiply(r, grad, basis);
  } else {
    for_tiles(grad.size(0), grad.size(1), [&](int64_t i, int64_t j, int64_t rows, int64_t columns) {
      const Tensor g = widened(grad, i, j, rows, columns, scratch);
      if (left) {
        multiply(part(r, 0, j, r.size(0), columns), transposed(basis, i, rows), g, i > 0);
      } else {
        multiply(part(r, i, 0, rows, r.size(1)), g, part(basis, j, 0, columns, basis.size(1)), j > 0);
      }
    });
  }
}

// param <- beta * param + alpha * back(x) where ok, which has a flag a channel (null: everywhere); basis in fp32.
void back_project_into(const Tensor& param, const Tensor& x, const Tensor& basis, bool left, double beta, double alpha,
                       const uint8_t* ok, Scratch& scratch) {
  const int64_t m = param.size(0), n = param.size(1);
  if (storage(param) == DType::f32 && ok == nullptr) {
    if (m == 0 || n == 0) return;
    const Tensor basis_t = transposed(basis, 0, basis.size(0));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(param.get(), param.get(), (left ? basis : x).get(),
                                                           (left ? x : basis_t).get(), beta, alpha));
    return;
  }
  for_tiles(m, n, [&](int64_t i, int64_t j, int64_t rows, int64_t columns) {
    const Tensor update = scratch.matrix(rows, columns);
    if (left) {
      multiply(update, part(basis, i, 0, rows, basis.size(1)), part(x, 0, j, x.size(0), columns));
    } else {
      multiply(update, part(x, i, 0, rows, x.size(1)), transposed(basis, j, columns));
    }
    const Matrix w{storage(param), data<char>(param) + (i * n + j) * int64_t(param.element_size()), n};
    const uint8_t *ok_rows = ok && !left ? ok + i : nullptr, *ok_columns = ok && left ? ok + j : nullptr;
    const float* delta = data<float>(update);
    parallel(rows, columns, [&](int64_t begin, int64_t end) {
      kernels().apply(w, delta, ok_rows, ok_columns, columns, float(beta), float(alpha), begin, end);
    });
  });
}

// One step from the projected gradient r; x, which may be r, gets the Adam update. Returns the number of weights left out.
int64_t step_from(const Tensor& param, const Tensor& r, const Tensor& x, const Tensor& basis, const Tensor& exp_avg,
                  const Tensor& exp_avg_sq, const AdamStep& step, float grad_scale, bool left, Scratch& scratch) {
  const int64_t rows = r.size(0), columns = r.size(1), channels = left ? columns : rows;
  std::vector<uint8_t> ok(channels);
  const LowRankAdam adam{data<float>(r), data<float>(exp_avg), data<float>(exp_avg_sq), data<float>(x), ok.data(),
                         rows,           columns,              grad_scale,              step};
  std::atomic<int64_t> skipped = 0;
  parallel(channels, left ? rows : columns, [&](int64_t begin, int64_t end) {
    skipped += (left ? kernels().adam_columns : kernels().adam_rows)(adam, begin, end);
  });
  if (skipped < channels)
    back_project_into(param, x, basis, left, step.decay, step.alpha, skipped > 0 ? ok.data() : nullptr, scratch);
  return skipped * param.size(left ? 0 : 1);
}

struct Hyper {
  double beta1, beta2, eps, weight_decay, scale;
  AdamStep at(double step, double lr) const { return adam_step(beta1, beta2, eps, weight_decay, scale, lr, step); }
};

struct Galore {
  static constexpr const char* name = "galore_step";

  static void check(const Tensor& param, const Tensor& grad, const Tensor& basis, const Tensor& exp_avg,
                    const Tensor& exp_avg_sq, bool left) {
    check_galore_step(name, param, grad, basis, exp_avg, exp_avg_sq, left);
  }

  static int64_t run(const Tensor& param, const Tensor& grad, const Tensor& basis, const Tensor& exp_avg,
                     const Tensor& exp_avg_sq, const AdamStep& step, float grad_scale, bool left, Workspace& work) {
    const Tensor b = as_fp32(basis, work.basis), r = work.low_rank.matrix(exp_avg.size(0), exp_avg.size(1));
    project_into(r, grad, b, left, work.tile);
    return step_from(param, r, r, b, exp_avg, exp_avg_sq, step, grad_scale, left, work.tile);
  }
};

struct Subspace {
  static constexpr const char* name = "subspace_step";

  static void check(const Tensor& param, const Tensor& low_rank_grad, const Tensor& basis, const Tensor& exp_avg,
                    const Tensor& exp_avg_sq, bool left) {
    check_subspace_step(name, param, &low_rank_grad, basis, exp_avg, exp_avg_sq, left);
  }

  static int64_t run(const Tensor& param, const Tensor& r, const Tensor& basis, const Tensor& exp_avg,
                     const Tensor& exp_avg_sq, const AdamStep& step, float grad_scale, bool left, Workspace& work) {
    const Tensor b = as_fp32(basis, work.basis), x = work.low_rank.matrix(r.size(0), r.size(1));
    return step_from(param, r, x, b, exp_avg, exp_avg_sq, step, grad_scale, left, work.tile);
  }
};

float grad_scale_of(const Guards& guards) { return guards.grad_scale ? *data<float>(*guards.grad_scale) : 1.0f; }

bool is_no_op(const Guards& guards) { return guards.found_inf && *data<float>(*guards.found_inf) != 0.0f; }

void count_skipped(const Guards& guards, int64_t skipped) {
  if (guards.skipped) *data<int64_t>(*guards.skipped) += skipped;
}

template <class Op>
void step_plain(const Tensor& param, const Tensor& grad, const Tensor& basis, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                int64_t step, double lr, double beta1, double beta2, double eps, double weight_decay, double scale,
                bool left) {
  Op::check(param, grad, basis, exp_avg, exp_avg_sq, left);
  if (step < 1) fail(Op::name, "step counts from 1, got ", step);
  const Hyper hyper{beta1, beta2, eps, weight_decay, scale};
  Workspace work;
  Op::run(param, grad, basis, exp_avg, exp_avg_sq, hyper.at(double(step), lr), 1.0f, left, work);
}

template <class Op>
void step_tensor(const Tensor& param, const Tensor& grad, const Tensor& basis, const Tensor& exp_avg,
                 const Tensor& exp_avg_sq, const Tensor& step, const Tensor& lr, double beta1, double beta2, double eps,
                 double weight_decay, double scale, bool left) {
  Op::check(param, grad, basis, exp_avg, exp_avg_sq, left);
  expect_scalar(Op::name, "step", step, place_of(param));
  expect_scalar(Op::name, "lr", lr, place_of(param));
  const Hyper hyper{beta1, beta2, eps, weight_decay, scale};
  Workspace work;
  const AdamStep at = hyper.at(read_number(Op::name, "step", step), read_number(Op::name, "lr", lr));
  Op::run(param, grad, basis, exp_avg, exp_avg_sq, at, 1.0f, left, work);
}

template <class Op>
void step_list(const Tensors& params, const Tensors& grads, const Tensors& bases, const Tensors& exp_avgs,
               const Tensors& exp_avg_sqs, const Tensors& steps, const Tensor& lr, double beta1, double beta2, double eps,
               double weight_decay, double scale, bool left, const std::optional<Tensor>& grad_scale,
               const std::optional<Tensor>& found_inf, const std::optional<Tensor>& skipped) {
  const Guards guards{grad_scale, found_inf, skipped};
  check_length(Op::name, "grads", grads, "params", params);
  check_length(Op::name, "bases", bases, "params", params);
  check_length(Op::name, "exp_avgs", exp_avgs, "params", params);
  check_length(Op::name, "exp_avg_sqs", exp_avg_sqs, "params", params);
  check_length(Op::name, "steps", steps, "params", params);
  check_guards(Op::name, params, steps, lr, guards);
  for (size_t i = 0; i < params.size(); ++i) Op::check(params[i], grads[i], bases[i], exp_avgs[i], exp_avg_sqs[i], left);
  const double rate = read_number(Op::name, "lr", lr);
  if (is_no_op(guards)) return;
  const Hyper hyper{beta1, beta2, eps, weight_decay, scale};
  Workspace work;
  for (size_t i = 0; i < params.size(); ++i) {
    const float step = *data<float>(steps[i]) += 1.0f;
    count_skipped(guards, Op::run(params[i], grads[i], bases[i], exp_avgs[i], exp_avg_sqs[i], hyper.at(step, rate),
                                  grad_scale_of(guards), left, work));
  }
}

void adamw_step(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                const Tensors& steps, const Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
                const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                const std::optional<Tensor>& skipped) {
  const Guards guards{grad_scale, found_inf, skipped};
  check_adamw_step(params, grads, exp_avgs, exp_avg_sqs, steps, lr, guards);
  const double rate = read_number("adamw_step", "lr", lr);
  if (is_no_op(guards)) return;
  const Hyper hyper{beta1, beta2, eps, weight_decay, 1.0};
  for (size_t i = 0; i < params.size(); ++i) {
    const float step = *data<float>(steps[i]) += 1.0f;
    const AdamW adam{storage(params[i]),       storage(grads[i]),         data<void>(params[i]),
                     data<void>(grads[i]),     data<float>(exp_avgs[i]),  data<float>(exp_avg_sqs[i]),
                     grad_scale_of(guards),    hyper.at(step, rate)};
    std::atomic<int64_t> left_out = 0;
    parallel(params[i].numel(), 1, [&](int64_t begin, int64_t end) { left_out += kernels().adamw(adam, begin, end); });
    count_skipped(guards, left_out);
  }
}

Tensor project(const Tensor& grad, const Tensor& basis, bool left) {
  check_project("project", grad, basis, left);
  const Tensor r = empty(low_rank_shape(grad, basis, left));
  Workspace work;
  project_into(r, grad, as_fp32(basis, work.basis), left, work.tile);
  return r;
}

void back_project(const Tensor& param, const Tensor& low_rank, const Tensor& basis, double alpha, double beta, bool left) {
  check_back_project("back_project_", param, low_rank, basis, left);
  Workspace work;
  back_project_into(param, low_rank, as_fp32(basis, work.basis), left, beta, alpha, nullptr, work.tile);
}

Tensor channel_norms(const Tensor& grad, bool left) {
  expect_matrix("channel_norms", "grad", grad);
  const int64_t m = grad.size(0), n = grad.size(1);
  const Tensor norms = empty({left ? n : m});
  const Matrix g{storage(grad), data<void>(grad), n};
  float* out = data<float>(norms);
  parallel(left ? n : m, left ? m : n, [&](int64_t begin, int64_t end) {
    left ? kernels().column_norms(g, m, out, begin, end) : kernels().row_norms(g, n, out, begin, end);
  });
  return norms;
}

STABLE_TORCH_LIBRARY_IMPL(lowrank, CPU, library) {
  library.impl("galore_step.tensor", TORCH_BOX(&step_tensor<Galore>));
  library.impl("galore_step", TORCH_BOX(&step_plain<Galore>));
  library.impl("galore_step.list", TORCH_BOX(&step_list<Galore>));
  library.impl("subspace_step.tensor", TORCH_BOX(&step_tensor<Subspace>));
  library.impl("subspace_step", TORCH_BOX(&step_plain<Subspace>));
  library.impl("subspace_step.list", TORCH_BOX(&step_list<Subspace>));
  library.impl("adamw_step", TORCH_BOX(&adamw_step));
  library.impl("project", TORCH_BOX(&project));
  library.impl("back_project_", TORCH_BOX(&back_project));
  library.impl("channel_norms", TORCH_BOX(&channel_norms));
}

}  // namespace
}  // namespace lowrank
