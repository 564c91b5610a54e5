// torch.ops.lowrank on the CPU: the low-rank step, project -> rule -> apply, for every combination of policies.
#include "../step.h"

#include <cmath>

#include "apply.h"
#include "gaussian.h"
#include "int8_gemm.h"
#include "remainder.h"

namespace lowrank {
namespace {

// The numbers of a step.
struct Options {
  Hyper hyper;
  double residual_scale;
  bool left, sign, per_tensor, scale_front;
  double growth;
  int64_t group_size, basis_group_size, seed;
};

// One matrix on its way. R and X have the moments' shape; with int8_gemm the basis stays as it is stored.
class Step {
 public:
  Step(const Entry& entry, const Policies& policies, const Options& options, double count, double rate, float grad_scale,
       Workspace& work)
      : x_(entry), p_(policies), o_(options), left_(options.left), count_(count), grad_scale_(grad_scale), work_(work) {
    Hyper hyper = o_.hyper;
    if (p_.remainder != Remainder::none) hyper.scale = 1.0;
    adam_ = hyper.at(count, rate);
  }

  // Returns how many weights were left out.
  int64_t run() {
    if (p_.basis != BasisKind::key && !p_.int8_gemm) basis_ = stored_basis();
    const Tensor r = p_.projected ? x_.gradient : work_.low_rank.matrix(rows(), columns());
    if (!p_.projected) project(r);
    const int64_t skipped = p_.ratio() ? scaled(r) : p_.remainder == Remainder::state_free ? state_free(r) : plain(r);
    return skipped * depth();
  }

 private:
  int64_t depth() const { return x_.weight.size(left_ ? 0 : 1); }
  int64_t rows() const { return x_.moments.exp_avg.size(0); }
  int64_t columns() const { return x_.moments.exp_avg.size(1); }
  Tensor update() { return work_.update.matrix(rows(), columns()); }

  Basis stored_basis() {
    if (p_.basis == BasisKind::dense) return as_fp32(x_.basis, work_.basis);
    return as_int4(x_.basis, *x_.basis_scale, *x_.basis_offset, depth(), o_.basis_group_size);
  }

  void project(const Tensor& r) {
    if (p_.basis == BasisKind::key) {
      const int64_t* key = data<int64_t>(x_.basis);
      gaussian_project_into(r, x_.gradient, gaussian_basis(key[0], key[1], key[2], x_.rank(p_.basis, left_)), key[3], left_, work_);
    } else if (p_.int8_gemm) {
      project_int8_gemm(r, x_.gradient, x_.basis, left_, work_);
    } else {
      project_into(r, x_.gradient, basis_, left_, work_);
    }
  }

  // W <- decay W + alpha back(X).
  int64_t plain(const Tensor& r) {
    const Tensor x = p_.projected ? update() : r;
    const Channels c = adam(r, x_.moments, x, adam_, grad_scale_, left_);
    if (c.skipped == c.count()) return c.skipped;
    if (p_.int8_gemm) {
      back_project_int8_gemm(x_.weight, x, x_.basis, left_, adam_.decay, adam_.alpha, c.flags(), rounding(), work_);
    } else {
      apply({.left = left_, .decay = adam_.decay, .alpha = adam_.alpha, .basis = &basis_, .x = &x, .ok = c.flags()});
    }
    return c.skipped;
  }

  Scaling scaling() const {
    if (p_.remainder == Remainder::scaled_residual) return {o_.hyper.scale, 1.0, 1.0, o_.per_tensor, o_.growth};
    const double root = std::sqrt(o_.hyper.scale);
    return {0.0, o_.scale_front ? root : 1.0, o_.scale_front ? 1.0 : root, o_.per_tensor, o_.growth};
  }

  // W <- decay W + a (s o G), or + a (scale back(N) + s o (G - scale back(R))) = + a (back(scale N - scale s o R) + s o G): the
  // correction of Adam's bias is in the rate a, and s are norm ratios.
  int64_t scaled(const Tensor& r) {
    const bool residual = p_.remainder == Remainder::scaled_residual;
    const std::optional<Tensor> n = residual ? std::optional<Tensor>(update()) : std::nullopt;
    const Channels c = ratio(r, x_.moments, n ? &*n : nullptr, x_.limiter ? &x_.gradient : nullptr, adam_, grad_scale_, left_);
    if (c.skipped == c.count()) return c.skipped;
    std::vector<float> in_basis;
    if (x_.limiter && x_.gram) in_basis = norms_in_basis(r, *x_.gram, work_.tile.matrix(rows(), columns()), left_);
    auto s = ratio_coefficients(c, scaling(), x_.limiter ? data<float>(*x_.limiter) : nullptr, in_basis, grad_scale_);
    if (n) combine(*n, r, s, o_.hyper.scale, o_.hyper.scale, left_);
    for (float& coefficient : s) coefficient *= grad_scale_;
    apply({.left = left_,
           .decay = adam_.decay,
           .alpha = adam_.alpha * (std::sqrt(adam_.correction2) / adam_.correction1),
           .basis = &basis_,
           .x = n ? &*n : nullptr,
           .gradient = &x_.gradient,
           .coefficients = s.data()});
    return c.skipped;
  }

  // W <- decay W + alpha (scale back(X) + residual_scale phi): phi is G - back(R), whose back(R) joins X, or its sign.
  int64_t state_free(const Tensor& r) {
    const Tensor x = update();
    const Channels c = adam(r, x_.moments, x, adam_, grad_scale_, left_);
    if (c.skipped == c.count()) return c.skipped;
    // The sign of a scaled gradient is that of the gradient times that of the scale.
    const double unit = o_.sign ? double((grad_scale_ > 0.0f) - (grad_scale_ < 0.0f)) : double(grad_scale_);
    const auto s = equal_coefficients(c, o_.residual_scale * unit);
    combine(x, r, s, o_.hyper.scale, o_.sign ? 0.0 : 1.0, left_);
    apply({.left = left_,
           .decay = adam_.decay,
           .alpha = adam_.alpha,
           .basis = &basis_,
           .x = &x,
           .gradient = &x_.gradient,
           .inside = o_.sign ? &r : nullptr,
           .coefficients = s.data()});
    return c.skipped;
  }

  Rounding rounding() const {
    return {p_.draws(), {uint64_t(o_.seed), counter_step(count_), uint32_t(x_.parameter)}, uint64_t(x_.offset)};
  }

  void apply(const Update& u) {
    const Rounding how = rounding();
    if (!p_.int8) return apply_into(x_.weight, u, how, work_);
    apply_int8_into(as_int8(x_.weight, *x_.weight_scale, o_.group_size), x_.weight.size(0), u, how.stream, how.first, work_);
  }

  const Entry& x_;
  const Policies& p_;
  const Options& o_;
  const bool left_;
  const double count_;
  const float grad_scale_;
  Workspace& work_;
  AdamStep adam_;
  Basis basis_ = Int4{};
};

void step(const Tensors& weights, const Tensors& weight_scales, const Tensors& gradients, const Tensors& bases,
          const Tensors& basis_parts, const Tensors& states, const Tensors& steps, const Tensor& lr, const std::string& weight,
          const std::string& basis, const std::string& moments, const std::string& rule, const std::string& remainder, double beta1,
          double beta2, double eps, double weight_decay, double scale, bool left, double residual_scale, bool sign, bool per_tensor,
          bool scale_front, double growth, bool projected, bool int8_gemm, bool advance, int64_t group_size,
          int64_t basis_group_size, bool stochastic, int64_t seed, const std::vector<int64_t>& parameters,
          const std::vector<int64_t>& offsets, const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
          const std::optional<Tensor>& skipped, const std::string& op) {
  const Guards guards{grad_scale, found_inf, skipped};
  const Policies p = check_policies(op.c_str(), weight, basis, moments, rule, remainder, projected, int8_gemm, stochastic);
  const Draws draws{stochastic, seed, parameters, offsets};
  const auto entries = entries_of(op.c_str(), {weights, weight_scales, gradients, bases, basis_parts, states, steps, draws}, p);
  check_guards(op.c_str(), "weights", weights, steps, &lr, guards, advance);
  Where where(op, entries.size());
  for (size_t i = 0; i < entries.size(); ++i) check_entry(where.at(i), entries[i], p, left, group_size, basis_group_size);
  if (is_no_op(guards)) return;
  const Options options{{beta1, beta2, eps, weight_decay, scale},
                        residual_scale,
                        left,
                        sign,
                        per_tensor,
                        scale_front,
                        growth,
                        group_size,
                        basis_group_size,
                        seed};
  const double rate = read_number(lr);
  Workspace work;
  for (const Entry& entry : entries) {
    const double count = count_of(entry.step, advance);
    count_skipped(guards, Step(entry, p, options, count, rate, grad_scale_of(guards), work).run());
  }
}

STABLE_TORCH_LIBRARY_IMPL(lowrank, CPU, library) { library.impl("step", TORCH_BOX(&step)); }

}  // namespace
}  // namespace lowrank
