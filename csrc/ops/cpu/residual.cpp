// torch.ops.lowrank on the CPU: steps that use the part of the gradient that a basis does not hold.
#include "residual.h"

#include "../../cpu/norms.h"
#include "../../cpu/residual.h"
#include "../../cpu/steps.h"
#include "gaussian.h"

namespace lowrank {
namespace {

constexpr double kTiny = 1e-8;  // beside norms that divide, as the papers' code has it

// One matrix of a step.
struct Matrices {
  const Tensor &param, &grad, &basis, &exp_avg, &exp_avg_sq;
  bool left;
  LowRankGradient low_rank() const { return {grad, basis, exp_avg, exp_avg_sq, left}; }
  int64_t channels() const { return low_rank().channels(); }
  int64_t depth() const { return low_rank().depth(); }
};

void project_any(const Tensor& r, const LowRankGradient& t, Workspace& work) {
  if (is_key(t.basis)) {
    const int64_t* key = data<int64_t>(t.basis);
    gaussian_project_into(r, t.grad, gaussian_basis(key[0], key[1], key[2], r.size(t.left ? 0 : 1)), key[3], t.left, work);
  } else {
    project_into(r, t.grad, as_fp32(t.basis, work.basis), t.left, work.tile);
  }
}

// Moments, and the sums of squares of R and of N; R is scaled in place. x gets N if it is given.
void ratio(Channels& c, const LowRankGradient& t, const Tensor& r, const Tensor* x, const AdamStep& step, float grad_scale,
           bool limited) {
  const int64_t m = t.grad.size(0), n = t.grad.size(1);
  if (limited) {
    c.gradient_norms.resize(t.channels());
    const Matrix g{storage(t.grad), data<void>(t.grad), n};
    parallel(t.channels(), t.depth(), [&](int64_t begin, int64_t end) {
      t.left ? norm_kernels().columns(g, m, c.gradient_norms.data(), begin, end)
             : norm_kernels().rows(g, n, c.gradient_norms.data(), begin, end);
    });
  }
  const Ratio a{data<float>(r),
                data<float>(t.exp_avg),
                data<float>(t.exp_avg_sq),
                x ? data<float>(*x) : nullptr,
                c.r_squares.data(),
                c.n_squares.data(),
                limited ? c.gradient_norms.data() : nullptr,
                c.ok.data(),
                r.size(0),
                r.size(1),
                grad_scale,
                step};
  std::atomic<int64_t> skipped = 0;
  parallel(t.channels(), t.left ? r.size(0) : r.size(1), [&](int64_t begin, int64_t end) {
    skipped += (t.left ? residual_kernels().ratio_columns : residual_kernels().ratio_rows)(a, begin, end);
  });
  c.skipped = skipped;
}

// What the scaled gradient of this norm is divided by, so that it grows by at most `growth` a step.
double limit(double norm, float& before, double growth) {
  double divisor = 1.0;
  if (before > 0.0f && norm > 0.0) divisor = std::max(norm / (double(before) + kTiny), growth) / growth;
  if (norm > 0.0) before = float(norm / divisor);
  return divisor;
}

// c.coefficients <- s times its factors over the limiter's divisor, NaN where a channel is not usable. in_basis: RᵀBᵀBR by
// channel, or null where it is |R|².
void coefficients(Channels& c, const Scaling& how, float* limiter, const float* in_basis, float grad_scale) {
  double n_all = 0.0, r_all = 0.0, all = 0.0;
  for (size_t i = 0; i < c.ok.size(); ++i) n_all += c.n_squares[i], r_all += c.r_squares[i];
  std::vector<double> s(c.ok.size());
  for (size_t i = 0; i < c.ok.size(); ++i) {
    const double n = how.per_tensor ? n_all : c.n_squares[i], r = how.per_tensor ? r_all : c.r_squares[i];
    s[i] = std::sqrt(n) / (std::sqrt(r) + kTiny) * how.front;
    if (limiter == nullptr || !c.ok[i]) continue;
    const double g = double(c.gradient_norms[i]) * grad_scale, inside = in_basis ? in_basis[i] : c.r_squares[i];
    const double squares = g * g - 2.0 * how.alpha * c.r_squares[i] + how.alpha * how.alpha * inside;
    all += s[i] * s[i] * std::max(squares, 0.0);
  }
  const double factor = how.behind / (limiter ? limit(std::sqrt(all), *limiter, how.growth) : 1.0);
  for (size_t i = 0; i < c.ok.size(); ++i) c.coefficients[i] = c.ok[i] ? float(s[i] * factor) : NAN;
}

// w <- decay w + rate (back(x) + coefficient * direction), tile by tile; x may be null. The direction is G, or the sign of
// G - back(inside) if that is given.
void move(const Matrices& t, const Tensor& basis, const Tensor* x, const Tensor* inside, const Channels& c, float decay, float rate,
          Buffers& buffers) {
  if (c.skipped == t.channels()) return;
  const int64_t m = t.param.size(0), n = t.param.size(1);
  const auto from = [&](const Tensor& matrix, int64_t i, int64_t j) {
    return Matrix{storage(matrix), data<char>(matrix) + (i * n + j) * int64_t(matrix.element_size()), n};
  };
  const float *by_row = t.left ? nullptr : c.coefficients.data(), *by_column = t.left ? c.coefficients.data() : nullptr;
  const auto run = [&](int64_t i, int64_t j, int64_t rows, int64_t columns, const float* back, const float* within) {
    const Move a{from(t.param, i, j),
                 from(t.grad, i, j),
                 back,
                 within,
                 by_row ? by_row + i : nullptr,
                 by_column ? by_column + j : nullptr,
                 columns,
                 decay,
                 rate};
    parallel(rows, columns, [&](int64_t begin, int64_t end) { residual_kernels().move(a, begin, end); });
  };
  if (x == nullptr) {
    run(0, 0, m, n, nullptr, nullptr);
    return;
  }
  const auto product = [&](const Tensor& low_rank, Scratch& scratch, int64_t i, int64_t j, int64_t rows, int64_t columns) {
    const Tensor out = scratch.matrix(rows, columns);
    if (t.left) {
      multiply(out, part(basis, i, 0, rows, basis.size(1)), part(low_rank, 0, j, low_rank.size(0), columns));
    } else {
      multiply(out, part(low_rank, i, 0, rows, low_rank.size(1)), transposed(basis, j, columns));
    }
    return out;
  };
  for_tiles(m, n, [&](int64_t i, int64_t j, int64_t rows, int64_t columns) {
    const Tensor back = product(*x, buffers.work.tile, i, j, rows, columns);
    if (inside == nullptr) {
      run(i, j, rows, columns, data<float>(back), nullptr);
    } else {
      const Tensor within = product(*inside, buffers.inside, i, j, rows, columns);
      run(i, j, rows, columns, data<float>(back), data<float>(within));
    }
  });
}

// x <- p x - q c r, with c the coefficient of the channel; 0 where a channel is left out.
void combine(const Matrices& t, const Tensor& x, const Tensor& r, const Channels& c, double p, double q) {
  const float *by_row = t.left ? nullptr : c.coefficients.data(), *by_column = t.left ? c.coefficients.data() : nullptr;
  parallel(x.size(0), x.size(1), [&](int64_t begin, int64_t end) {
    residual_kernels().combine(data<float>(x), data<float>(r), by_row, by_column, float(p), float(q), x.size(1), begin, end);
  });
}

float* state(const std::optional<Tensor>& limiter) { return limiter ? data<float>(*limiter) : nullptr; }

}  // namespace

Channels apollo_channels(const LowRankGradient& t, const std::optional<Tensor>& limiter, const AdamStep& step, float grad_scale,
                         const Scaling& how, Buffers& buffers) {
  const Tensor r = buffers.work.low_rank.matrix(t.exp_avg.size(0), t.exp_avg.size(1));
  project_any(r, t, buffers.work);
  Channels c(t.channels());
  ratio(c, t, r, nullptr, step, grad_scale, limiter.has_value());
  coefficients(c, how, state(limiter), nullptr, grad_scale);
  for (float& coefficient : c.coefficients) coefficient *= grad_scale;
  return c;
}

namespace {

int64_t apollo(const Matrices& t, const std::optional<Tensor>& limiter, const AdamStep& step, float grad_scale, const Scaling& how,
               Buffers& buffers) {
  const Channels c = apollo_channels(t.low_rank(), limiter, step, grad_scale, how, buffers);
  move(t, t.basis, nullptr, nullptr, c, step.decay, corrected(step), buffers);
  return c.skipped * t.depth();
}

int64_t fira(const Matrices& t, const std::optional<Tensor>& limiter, const std::optional<Tensor>& gram, const AdamStep& step,
             float grad_scale, const Scaling& how, Buffers& buffers) {
  const int64_t rows = t.exp_avg.size(0), columns = t.exp_avg.size(1);
  const Tensor r = buffers.work.low_rank.matrix(rows, columns), x = buffers.update.matrix(rows, columns);
  const Tensor basis = as_fp32(t.basis, buffers.work.basis);
  project_into(r, t.grad, basis, t.left, buffers.work.tile);
  Channels c(t.channels());
  ratio(c, t.low_rank(), r, &x, step, grad_scale, limiter.has_value());
  std::vector<float> in_basis;
  if (limiter && gram && r.numel() > 0) {
    const Tensor y = buffers.small.matrix(rows, columns);
    t.left ? multiply(y, *gram, r) : multiply(y, r, *gram);
    in_basis.resize(t.channels());
    const float *a = data<float>(r), *b = data<float>(y);
    if (t.left) {
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) in_basis[j] += a[i * columns + j] * b[i * columns + j];
    } else {
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) in_basis[i] += a[i * columns + j] * b[i * columns + j];
    }
  }
  coefficients(c, how, state(limiter), in_basis.empty() ? nullptr : in_basis.data(), grad_scale);
  combine(t, x, r, c, how.alpha, how.alpha);
  for (float& coefficient : c.coefficients) coefficient *= grad_scale;
  move(t, basis, &x, nullptr, c, step.decay, corrected(step), buffers);
  return c.skipped * t.depth();
}

int64_t frugal(const Matrices& t, const AdamStep& step, float grad_scale, double scale, double residual_scale, bool sign,
               Buffers& buffers) {
  const int64_t rows = t.exp_avg.size(0), columns = t.exp_avg.size(1);
  const Tensor r = buffers.work.low_rank.matrix(rows, columns), x = buffers.update.matrix(rows, columns);
  const Tensor basis = as_fp32(t.basis, buffers.work.basis);
  project_into(r, t.grad, basis, t.left, buffers.work.tile);
  Channels c(t.channels());
  const LowRankAdam adam{data<float>(r),
                         data<float>(t.exp_avg),
                         data<float>(t.exp_avg_sq),
                         data<float>(x),
                         c.ok.data(),
                         rows,
                         columns,
                         grad_scale,
                         step};
  std::atomic<int64_t> skipped = 0;
  parallel(t.channels(), t.left ? rows : columns, [&](int64_t begin, int64_t end) {
    skipped += (t.left ? step_kernels().adam_columns : step_kernels().adam_rows)(adam, begin, end);
  });
  c.skipped = skipped;
  // The sign of a scaled gradient is that of the gradient times that of the scale.
  const double unit = sign ? double((grad_scale > 0.0f) - (grad_scale < 0.0f)) : double(grad_scale);
  for (size_t i = 0; i < c.ok.size(); ++i) c.coefficients[i] = c.ok[i] ? float(residual_scale * unit) : NAN;
  combine(t, x, r, c, scale, sign ? 0.0 : 1.0);
  move(t, basis, &x, sign ? &r : nullptr, c, step.decay, step.alpha, buffers);
  return c.skipped * t.depth();
}

// Checks a list form and runs f(i, step, rate, grad_scale), which returns how many weights it left out, on every matrix.
template <class Check, class F>
void for_list(const char* op, const Tensors& params, const Tensors& grads, const Tensors& bases, const Tensors& exp_avgs,
              const Tensors& exp_avg_sqs, const std::vector<std::pair<const char*, const Tensors*>>& extras, const Tensors& steps,
              const Tensor& lr, const Guards& guards, const Check& check, const F& f) {
  check_length(op, "grads", grads, "params", params);
  check_length(op, "bases", bases, "params", params);
  check_length(op, "exp_avgs", exp_avgs, "params", params);
  check_length(op, "exp_avg_sqs", exp_avg_sqs, "params", params);
  for (const auto& [name, list] : extras)
    if (!list->empty()) check_length(op, name, *list, "params", params);
  check_length(op, "steps", steps, "params", params);
  check_guards(op, params, steps, lr, guards);
  for (size_t i = 0; i < params.size(); ++i) check(i);
  const double rate = read_number(op, "lr", lr);
  if (is_no_op(guards)) return;
  for (size_t i = 0; i < params.size(); ++i) {
    const float step = *data<float>(steps[i]) += 1.0f;
    count_skipped(guards, f(i, double(step), rate, grad_scale_of(guards)));
  }
}

void apollo_plain(const Tensor& param, const Tensor& grad, const Tensor& basis, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                  const std::optional<Tensor>& limiter, int64_t step, double lr, double beta1, double beta2, double eps,
                  double weight_decay, double scale, bool left, bool per_tensor, bool scale_front, double growth) {
  check_apollo_step(param, grad, basis, exp_avg, exp_avg_sq, limiter, left);
  const AdamStep at = Hyper{beta1, beta2, eps, weight_decay}.at(count_of("apollo_step", step), lr);
  Buffers buffers;
  apollo({param, grad, basis, exp_avg, exp_avg_sq, left}, limiter, at, 1.0f, apollo_scaling(scale, per_tensor, scale_front, growth),
         buffers);
}

void apollo_tensor(const Tensor& param, const Tensor& grad, const Tensor& basis, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                   const std::optional<Tensor>& limiter, const Tensor& step, const Tensor& lr, double beta1, double beta2,
                   double eps, double weight_decay, double scale, bool left, bool per_tensor, bool scale_front, double growth) {
  check_apollo_step(param, grad, basis, exp_avg, exp_avg_sq, limiter, left);
  const double count = number_of("apollo_step", "step", step, param), rate = number_of("apollo_step", "lr", lr, param);
  Buffers buffers;
  apollo({param, grad, basis, exp_avg, exp_avg_sq, left}, limiter, Hyper{beta1, beta2, eps, weight_decay}.at(count, rate), 1.0f,
         apollo_scaling(scale, per_tensor, scale_front, growth), buffers);
}

void apollo_list(const Tensors& params, const Tensors& grads, const Tensors& bases, const Tensors& exp_avgs,
                 const Tensors& exp_avg_sqs, const Tensors& limiters, const Tensors& steps, const Tensor& lr, double beta1,
                 double beta2, double eps, double weight_decay, double scale, bool left, bool per_tensor, bool scale_front,
                 double growth, const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                 const std::optional<Tensor>& skipped) {
  Buffers buffers;
  const Hyper hyper{beta1, beta2, eps, weight_decay};
  const Scaling how = apollo_scaling(scale, per_tensor, scale_front, growth);
  for_list(
      "apollo_step", params, grads, bases, exp_avgs, exp_avg_sqs, {{"limiters", &limiters}}, steps, lr,
      {grad_scale, found_inf, skipped},
      [&](size_t i) { check_apollo_step(params[i], grads[i], bases[i], exp_avgs[i], exp_avg_sqs[i], entry(limiters, i), left); },
      [&](size_t i, double step, double rate, float factor) {
        return apollo({params[i], grads[i], bases[i], exp_avgs[i], exp_avg_sqs[i], left}, entry(limiters, i), hyper.at(step, rate),
                      factor, how, buffers);
      });
}

void fira_plain(const Tensor& param, const Tensor& grad, const Tensor& basis, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                const std::optional<Tensor>& limiter, const std::optional<Tensor>& gram, int64_t step, double lr, double beta1,
                double beta2, double eps, double weight_decay, double alpha, bool left, double growth) {
  check_fira_step(param, grad, basis, exp_avg, exp_avg_sq, limiter, gram, left);
  const AdamStep at = Hyper{beta1, beta2, eps, weight_decay}.at(count_of("fira_step", step), lr);
  Buffers buffers;
  fira({param, grad, basis, exp_avg, exp_avg_sq, left}, limiter, gram, at, 1.0f, {alpha, growth, false, 1.0, 1.0}, buffers);
}

void fira_tensor(const Tensor& param, const Tensor& grad, const Tensor& basis, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                 const std::optional<Tensor>& limiter, const std::optional<Tensor>& gram, const Tensor& step, const Tensor& lr,
                 double beta1, double beta2, double eps, double weight_decay, double alpha, bool left, double growth) {
  check_fira_step(param, grad, basis, exp_avg, exp_avg_sq, limiter, gram, left);
  const double count = number_of("fira_step", "step", step, param), rate = number_of("fira_step", "lr", lr, param);
  Buffers buffers;
  fira({param, grad, basis, exp_avg, exp_avg_sq, left}, limiter, gram, Hyper{beta1, beta2, eps, weight_decay}.at(count, rate), 1.0f,
       {alpha, growth, false, 1.0, 1.0}, buffers);
}

void fira_list(const Tensors& params, const Tensors& grads, const Tensors& bases, const Tensors& exp_avgs,
               const Tensors& exp_avg_sqs, const Tensors& limiters, const Tensors& grams, const Tensors& steps, const Tensor& lr,
               double beta1, double beta2, double eps, double weight_decay, double alpha, bool left, double growth,
               const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
               const std::optional<Tensor>& skipped) {
  Buffers buffers;
  const Hyper hyper{beta1, beta2, eps, weight_decay};
  for_list(
      "fira_step", params, grads, bases, exp_avgs, exp_avg_sqs, {{"limiters", &limiters}, {"grams", &grams}}, steps, lr,
      {grad_scale, found_inf, skipped},
      [&](size_t i) {
        check_fira_step(params[i], grads[i], bases[i], exp_avgs[i], exp_avg_sqs[i], entry(limiters, i), entry(grams, i), left);
      },
      [&](size_t i, double step, double rate, float factor) {
        return fira({params[i], grads[i], bases[i], exp_avgs[i], exp_avg_sqs[i], left}, entry(limiters, i), entry(grams, i),
                    hyper.at(step, rate), factor, {alpha, growth, false, 1.0, 1.0}, buffers);
      });
}

void frugal_plain(const Tensor& param, const Tensor& grad, const Tensor& basis, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                  int64_t step, double lr, double beta1, double beta2, double eps, double weight_decay, double scale,
                  double residual_scale, bool sign, bool left) {
  check_galore_step("frugal_step", param, grad, basis, exp_avg, exp_avg_sq, left);
  const AdamStep at = Hyper{beta1, beta2, eps, weight_decay}.at(count_of("frugal_step", step), lr);
  Buffers buffers;
  frugal({param, grad, basis, exp_avg, exp_avg_sq, left}, at, 1.0f, scale, residual_scale, sign, buffers);
}

void frugal_tensor(const Tensor& param, const Tensor& grad, const Tensor& basis, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                   const Tensor& step, const Tensor& lr, double beta1, double beta2, double eps, double weight_decay, double scale,
                   double residual_scale, bool sign, bool left) {
  check_galore_step("frugal_step", param, grad, basis, exp_avg, exp_avg_sq, left);
  const double count = number_of("frugal_step", "step", step, param), rate = number_of("frugal_step", "lr", lr, param);
  Buffers buffers;
  frugal({param, grad, basis, exp_avg, exp_avg_sq, left}, Hyper{beta1, beta2, eps, weight_decay}.at(count, rate), 1.0f, scale,
         residual_scale, sign, buffers);
}

void frugal_list(const Tensors& params, const Tensors& grads, const Tensors& bases, const Tensors& exp_avgs,
                 const Tensors& exp_avg_sqs, const Tensors& steps, const Tensor& lr, double beta1, double beta2, double eps,
                 double weight_decay, double scale, double residual_scale, bool sign, bool left,
                 const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                 const std::optional<Tensor>& skipped) {
  Buffers buffers;
  const Hyper hyper{beta1, beta2, eps, weight_decay};
  for_list(
      "frugal_step", params, grads, bases, exp_avgs, exp_avg_sqs, {}, steps, lr, {grad_scale, found_inf, skipped},
      [&](size_t i) { check_galore_step("frugal_step", params[i], grads[i], bases[i], exp_avgs[i], exp_avg_sqs[i], left); },
      [&](size_t i, double step, double rate, float factor) {
        return frugal({params[i], grads[i], bases[i], exp_avgs[i], exp_avg_sqs[i], left}, hyper.at(step, rate), factor, scale,
                      residual_scale, sign, buffers);
      });
}

STABLE_TORCH_LIBRARY_IMPL(lowrank, CPU, library) {
  library.impl("apollo_step.tensor", TORCH_BOX(&apollo_tensor));
  library.impl("apollo_step", TORCH_BOX(&apollo_plain));
  library.impl("apollo_step.list", TORCH_BOX(&apollo_list));
  library.impl("fira_step.tensor", TORCH_BOX(&fira_tensor));
  library.impl("fira_step", TORCH_BOX(&fira_plain));
  library.impl("fira_step.list", TORCH_BOX(&fira_list));
  library.impl("frugal_step.tensor", TORCH_BOX(&frugal_tensor));
  library.impl("frugal_step", TORCH_BOX(&frugal_plain));
  library.impl("frugal_step.list", TORCH_BOX(&frugal_list));
}

}  // namespace
}  // namespace lowrank
