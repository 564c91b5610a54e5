#include "remainder.h"

#include <cmath>

#include "../../cpu/residual.h"

namespace lowrank {
namespace {

constexpr double kTiny = 1e-8;  // beside norms that divide, as the papers' code has it

// What the scaled gradient of this norm is divided by, so that it grows by at most `growth` a step.
double limit(double norm, float& before, double growth) {
  double divisor = 1.0;
  if (before > 0.0f && norm > 0.0) divisor = std::max(norm / (double(before) + kTiny), growth) / growth;
  if (norm > 0.0) before = float(norm / divisor);
  return divisor;
}

}  // namespace

std::vector<float> ratio_coefficients(const Channels& c, const Scaling& how, float* limiter, const std::vector<float>& in_basis,
                                      float grad_scale) {
  double n_all = 0.0, r_all = 0.0, all = 0.0;
  for (int64_t i = 0; i < c.count(); ++i) n_all += c.n_squares[i], r_all += c.r_squares[i];
  std::vector<double> s(c.count());
  for (int64_t i = 0; i < c.count(); ++i) {
    const double n = how.per_tensor ? n_all : c.n_squares[i], r = how.per_tensor ? r_all : c.r_squares[i];
    s[i] = std::sqrt(n) / (std::sqrt(r) + kTiny) * how.front;
    if (limiter == nullptr || !c.ok[i]) continue;
    const double g = double(c.gradient_norms[i]) * grad_scale, inside = in_basis.empty() ? c.r_squares[i] : in_basis[i];
    const double squares = g * g - 2.0 * how.alpha * c.r_squares[i] + how.alpha * how.alpha * inside;
    all += s[i] * s[i] * std::max(squares, 0.0);
  }
  const double factor = how.behind / (limiter ? limit(std::sqrt(all), *limiter, how.growth) : 1.0);
  std::vector<float> coefficients(c.count());
  for (int64_t i = 0; i < c.count(); ++i) coefficients[i] = c.ok[i] ? float(s[i] * factor) : NAN;
  return coefficients;
}

std::vector<float> equal_coefficients(const Channels& c, double coefficient) {
  std::vector<float> coefficients(c.count());
  for (int64_t i = 0; i < c.count(); ++i) coefficients[i] = c.ok[i] ? float(coefficient) : NAN;
  return coefficients;
}

std::vector<float> norms_in_basis(const Tensor& r, const Tensor& gram, const Tensor& y, bool left) {
  const int64_t rows = r.size(0), columns = r.size(1);
  std::vector<float> norms(left ? columns : rows);
  if (r.numel() == 0) return norms;
  left ? multiply(y, gram, r) : multiply(y, r, gram);
  const float *a = data<float>(r), *b = data<float>(y);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) norms[left ? j : i] += a[i * columns + j] * b[i * columns + j];
  return norms;
}

void combine(const Tensor& x, const Tensor& r, const std::vector<float>& coefficients, double p, double q, bool left) {
  const float* c = coefficients.data();
  parallel(x.size(0), x.size(1), [&](int64_t begin, int64_t end) {
    residual_kernels().combine(data<float>(x), data<float>(r), left ? nullptr : c, left ? c : nullptr, float(p), float(q),
                               x.size(1), begin, end);
  });
}

}  // namespace lowrank
