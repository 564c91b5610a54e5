// The rules of lowrank_sys/_ops/step.py.
#pragma once

#include "blockwise.h"
#include "gaussian.h"
#include "int4.h"
#include "rounding.h"
#include "sparse.h"

namespace lowrank {

enum class BasisKind { dense, int4, key };
enum class Remainder { none, scaled_gradient, scaled_residual, state_free };

// What is the same for all matrices of a step.
struct Policies {
  bool int8, stochastic;  // the weights, which else are float, and their rounding, which is always so of int8
  BasisKind basis;
  bool moments_8bit;
  Remainder remainder;
  bool projected, int8_gemm;

  // Whether rounding takes random bits.
  bool draws() const { return int8 || stochastic; }

  // Norm ratios scale the remainder, which a limiter may bound.
  bool ratio() const { return remainder == Remainder::scaled_gradient || remainder == Remainder::scaled_residual; }
};

// One of `known`, by its place.
template <size_t N>
size_t expect_member(const char* op, const char* name, const std::string& value, const char* const (&known)[N]) {
  std::string all;
  for (size_t i = 0; i < N; ++i) {
    if (value == known[i]) return i;
    all += (i > 0 ? ", " : "") + std::string(known[i]);
  }
  fail(op, name, " must be one of ", all, ", got ", value);
}

inline Policies check_policies(const char* op, const std::string& weight, const std::string& basis, const std::string& moments,
                               const std::string& rule, const std::string& remainder, bool projected, bool int8_gemm,
                               bool stochastic) {
  const Policies p{
      expect_member(op, "weight", weight, {"float", "int8"}) == 1,
      stochastic,
      BasisKind(expect_member(op, "basis", basis, {"dense", "int4", "key"})),
      expect_member(op, "moments", moments, {"fp32", "8bit"}) == 1,
      Remainder(expect_member(op, "remainder", remainder, {"none", "scaled-gradient", "scaled-residual", "state-free"})),
      projected,
      int8_gemm};
  const char* wanted = p.ratio() ? "ratio-adam" : "adam";
  if (rule != wanted) fail(op, "rule must be ", wanted, " with remainder ", remainder, ", got ", rule);
  if (p.basis == BasisKind::key && p.remainder != Remainder::scaled_gradient)
    fail(op, "basis must be dense or int4 with remainder ", remainder, ", got key");
  if (projected && p.remainder != Remainder::none) fail(op, "remainder must be none of a projected gradient, got ", remainder);
  const bool plain = !p.int8 && p.basis == BasisKind::dense && !p.moments_8bit && p.remainder == Remainder::none;
  if (int8_gemm && !plain)
    fail(op, "int8_gemm must be False with weight ", weight, ", basis ", basis, ", moments ", moments, ", remainder ", remainder,
         ", got True");
  return p;
}

// Both moments of R: in fp32, or as codes.
struct Moments {
  const Tensor &exp_avg, &exp_avg_sq;
  const Tensor *exp_avg_absmax = nullptr, *exp_avg_sq_absmax = nullptr;

  bool in_8bit() const { return exp_avg_absmax != nullptr; }
  Stored stored() const { return {exp_avg, exp_avg_sq, *exp_avg_absmax, *exp_avg_sq_absmax}; }
};

// One matrix of a step; what its policies do not have is null.
struct Entry {
  const Tensor& weight;
  const Tensor* weight_scale;
  const Tensor &gradient, &basis;
  const Tensor *basis_scale, *basis_offset, *gram;
  Moments moments;
  const Tensor *limiter, &step;
  int64_t parameter, offset;

  int64_t rank(BasisKind kind, bool left) const {
    if (kind == BasisKind::key) return moments.exp_avg.size(left ? 0 : 1);
    return basis.size(kind == BasisKind::int4 ? 0 : 1);
  }
};

struct StepLists {
  const Tensors &weights, &weight_scales, &gradients, &bases, &basis_parts, &states, &steps;
  Draws draws;
};

// A list that holds `least` to `most` columns of `count` tensors, one after the other: whether it holds the most.
inline bool check_columns(const char* op, const char* name, const Tensors& list, size_t count, size_t least, size_t most) {
  if (list.size() == most * count) return true;
  if (list.size() == least * count) return false;
  std::ostringstream wanted;
  wanted << least * count;
  if (least != most) wanted << " or " << most * count;
  fail(op, name, " must have ", wanted.str(), " tensors for ", count, " weights, got ", list.size());
}

// The lists as one entry a matrix; their lengths must fit.
inline std::vector<Entry> entries_of(const char* op, const StepLists& l, const Policies& p) {
  const size_t count = l.weights.size();
  const std::pair<const char*, const Tensors*> lists[] = {
      {"weight_scales", &l.weight_scales}, {"gradients", &l.gradients}, {"bases", &l.bases}, {"steps", &l.steps}};
  for (const auto& [name, list] : lists) {
    const size_t wanted = list == &l.weight_scales && !p.int8 ? 0 : count;
    if (list->size() != wanted) fail(op, name, " must have ", wanted, " tensors for ", count, " weights, got ", list->size());
  }
  const size_t parts = p.basis == BasisKind::int4 ? 2 : 0, moments = p.moments_8bit ? 4 : 2;
  const bool residual = p.remainder == Remainder::scaled_residual;
  const bool grams = check_columns(op, "basis_parts", l.basis_parts, count, parts, parts + residual) && residual;
  const bool limiters = check_columns(op, "states", l.states, count, moments, moments + p.ratio()) && p.ratio();
  l.draws.check(op, count, p.draws());
  std::vector<Entry> entries;
  entries.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const auto part = [&](size_t column) { return &l.basis_parts[column * count + i]; };
    const auto state = [&](size_t column) { return &l.states[column * count + i]; };
    entries.push_back({l.weights[i],
                       p.int8 ? &l.weight_scales[i] : nullptr,
                       l.gradients[i],
                       l.bases[i],
                       parts > 0 ? part(0) : nullptr,
                       parts > 0 ? part(1) : nullptr,
                       grams ? part(parts) : nullptr,
                       {*state(0), *state(1), p.moments_8bit ? state(2) : nullptr, p.moments_8bit ? state(3) : nullptr},
                       limiters ? state(moments) : nullptr,
                       l.steps[i],
                       p.draws() ? l.draws.parameter(i) : 0,
                       p.draws() ? l.draws.offset(i) : 0});
  }
  return entries;
}

inline void check_key(const char* op, const Tensor& key, const Tensor& exp_avg, const Place& place, bool left) {
  expect_like(op, "basis", key, Shape{4}, place);
  expect_dtype(op, "basis", key, aoti_torch_dtype_int64());
  if (exp_avg.dim() != 2) fail(op, "exp_avg must be a matrix ", left ? "(r, n)" : "(m, r)", ", got shape ", tuple(exp_avg.sizes()));
  if (exp_avg.size(left ? 0 : 1) < 1) fail(op, "rank must be at least 1, got exp_avg of shape ", tuple(exp_avg.sizes()));
  if (key.is_cpu()) expect_first(op, static_cast<const int64_t*>(key.data_ptr())[3]);
}

inline void check_entry(const char* op, const Entry& x, const Policies& p, bool left, int64_t group_size,
                        int64_t basis_group_size) {
  const Tensor& w = x.weight;
  const Place place = place_of(w);
  if (p.int8) {
    expect_int8(op, w, *x.weight_scale, group_size, "weight_scale");
  } else {
    expect_matrix(op, "param", w);
  }
  if (!p.projected) {
    expect_float(op, "grad", x.gradient);
    expect_like(op, "grad", x.gradient, w.sizes(), place);
  }
  if (p.basis == BasisKind::dense) {
    expect_basis(op, w, x.basis, left);
  } else if (p.basis == BasisKind::int4) {
    expect_int4(op, x.basis, *x.basis_scale, *x.basis_offset, w.size(left ? 0 : 1), basis_group_size, place,
                {"basis", "basis_scale", "basis_offset"});
  } else {
    check_key(op, x.basis, x.moments.exp_avg, place, left);
  }
  const int64_t r = x.rank(p.basis, left);
  const Shape shape = left ? Shape{r, w.size(1)} : Shape{w.size(0), r};
  if (p.projected) expect_low_rank(op, "low_rank_grad", x.gradient, shape, place);
  if (p.moments_8bit) {
    x.moments.stored().check(op, shape, place);
  } else {
    expect_low_rank(op, "exp_avg", x.moments.exp_avg, shape, place);
    expect_low_rank(op, "exp_avg_sq", x.moments.exp_avg_sq, shape, place);
  }
  if (x.gram != nullptr) expect_low_rank(op, "gram", *x.gram, Shape{r, r}, place);
  if (x.limiter != nullptr) {
    expect_scalar(op, "limiter", *x.limiter, place, true);
    expect_dtype(op, "limiter", *x.limiter, aoti_torch_dtype_float32());
  }
  if (p.draws()) expect_stream(op, x.parameter, x.offset);
}

// What errors of a matrix of a step begin with: the op, and which of several it is.
class Where {
 public:
  Where(const std::string& op, size_t count) : text_(count == 1 ? op : op + ": matrix "), prefix_(count == 1 ? 0 : text_.size()) {}

  const char* at(size_t i) {
    if (prefix_ > 0) text_.replace(prefix_, std::string::npos, std::to_string(i));
    return text_.c_str();
  }

 private:
  std::string text_;
  size_t prefix_;
};

// The rules of step.rows. row_scales is empty where no matrix has one.
struct RowLists {
  const Tensors &weights, &gradients, &indices, &row_scales, &exp_avgs, &exp_avg_sqs, &steps;

  std::optional<Tensor> scale_at(size_t i) const {
    return row_scales.empty() ? std::nullopt : std::optional<Tensor>(row_scales[i]);
  }
};

inline void check_rows(const std::string& name, const RowLists& l, const Tensor& lr, bool left, bool advance, const Draws& draws,
                       const Guards& guards) {
  const char* op = name.c_str();
  const size_t count = l.weights.size();
  const std::pair<const char*, const Tensors*> lists[] = {{"gradients", &l.gradients},     {"indices", &l.indices},
                                                          {"row_scales", &l.row_scales},   {"exp_avgs", &l.exp_avgs},
                                                          {"exp_avg_sqs", &l.exp_avg_sqs}, {"steps", &l.steps}};
  for (const auto& [what, list] : lists)
    if (list->size() != count && !(list == &l.row_scales && list->empty()))
      fail(op, what, " must have ", count, " tensors for ", count, " weights, got ", list->size());
  draws.check(op, count, draws.stochastic);
  check_guards(op, "weights", l.weights, l.steps, &lr, guards, advance);
  Where where(name, count);
  for (size_t i = 0; i < count; ++i) {
    const char* at = where.at(i);
    const Tensor &w = l.weights[i], &index = l.indices[i];
    const Place place = place_of(w);
    expect_matrix(at, "param", w);
    expect_float(at, "grad", l.gradients[i]);
    expect_like(at, "grad", l.gradients[i], w.sizes(), place);
    expect_indices(at, index, place);
    expect_row_scale(at, "row_scale", l.scale_at(i), index);
    const Shape shape = selected_shape(w, index, left);
    expect_low_rank(at, "exp_avg", l.exp_avgs[i], shape, place);
    expect_low_rank(at, "exp_avg_sq", l.exp_avg_sqs[i], shape, place);
    if (draws.stochastic) expect_stream(at, draws.parameter(i), draws.offset(i));
  }
}

}  // namespace lowrank
