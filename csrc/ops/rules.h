// The rules of lowrank_sys/_ops/rules.py with the same messages, and what the ops of all devices share.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../core/dtype.h"

// Newer headers have the check whose error says what torch said.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace lowrank {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Shape = std::vector<int64_t>;

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline int32_t dtype_of(const Tensor& t) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

inline std::string dtype_name(int32_t dtype) {
  const std::pair<int32_t, const char*> names[] = {
      {aoti_torch_dtype_float32(), "float32"},     {aoti_torch_dtype_bfloat16(), "bfloat16"},
      {aoti_torch_dtype_float16(), "float16"},     {aoti_torch_dtype_float64(), "float64"},
      {aoti_torch_dtype_int64(), "int64"},         {aoti_torch_dtype_int32(), "int32"},
      {aoti_torch_dtype_int16(), "int16"},         {aoti_torch_dtype_int8(), "int8"},
      {aoti_torch_dtype_uint8(), "uint8"},         {aoti_torch_dtype_bool(), "bool"},
      {aoti_torch_dtype_complex64(), "complex64"}, {aoti_torch_dtype_complex128(), "complex128"}};
  for (const auto& [known, name] : names)
    if (known == dtype) return std::string("torch.") + name;
  return "another dtype";
}

template <class Sizes>
std::string tuple(const Sizes& sizes) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << (sizes.size() == 1 ? ",)" : ")");
  return text.str();
}

struct Place {
  int32_t type, index;
  bool operator==(const Place&) const = default;
};

inline Place place_of(const Tensor& t) {
  Place place;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &place.type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &place.index));
  return place;
}

inline std::ostream& operator<<(std::ostream& out, const Place& place) {
  if (place.type == aoti_torch_device_type_cpu()) return out << "cpu";
  return out << (place.type == aoti_torch_device_type_cuda() ? "cuda:" : "device ") << place.index;
}

inline bool is_float(int32_t dtype) {
  return dtype == aoti_torch_dtype_float32() || dtype == aoti_torch_dtype_bfloat16() || dtype == aoti_torch_dtype_float16();
}

template <class Name>
void expect_float(const char* op, const Name& name, const Tensor& t) {
  if (!is_float(dtype_of(t))) fail(op, name, " must be float32, bfloat16 or float16, got ", dtype_name(dtype_of(t)));
}

template <class Name>
void expect_dtype(const char* op, const Name& name, const Tensor& t, int32_t dtype) {
  if (dtype_of(t) != dtype) fail(op, name, " must be ", dtype_name(dtype), ", got ", dtype_name(dtype_of(t)));
}

template <class Name>
void expect_contiguous(const char* op, const Name& name, const Tensor& t) {
  if (!t.is_contiguous()) fail(op, name, " must be contiguous, got strides ", tuple(t.strides()));
}

template <class Name>
void expect_on(const char* op, const Name& name, const Tensor& t, const Place& place) {
  if (place_of(t) != place) fail(op, name, " must be on ", place, ", got ", place_of(t));
}

template <class Name, class Sizes>
void expect_like(const char* op, const Name& name, const Tensor& t, const Sizes& shape, const Place& place) {
  const auto sizes = t.sizes();
  bool same = sizes.size() == shape.size();
  for (size_t i = 0; same && i < sizes.size(); ++i) same = sizes[i] == shape[i];
  if (!same) fail(op, name, " must have shape ", tuple(shape), ", got ", tuple(sizes));
  expect_on(op, name, t, place);
  expect_contiguous(op, name, t);
}

template <class Name>
void expect_matrix(const char* op, const Name& name, const Tensor& t) {
  if (t.dim() != 2) fail(op, name, " must be a matrix (m, n), got shape ", tuple(t.sizes()));
  expect_float(op, name, t);
  expect_contiguous(op, name, t);
}

// 0-dim and on `place`, or on the CPU as well unless it is written.
template <class Name>
void expect_scalar(const char* op, const Name& name, const Tensor& t, const Place& place, bool own_device = false) {
  if (t.dim() != 0) fail(op, name, " must be a 0-dim tensor, got shape ", tuple(t.sizes()));
  if (own_device || !t.is_cpu()) expect_on(op, name, t, place);
}

inline bool is_number(int32_t dtype) {
  return dtype == aoti_torch_dtype_float32() || dtype == aoti_torch_dtype_float64() || dtype == aoti_torch_dtype_int32() ||
         dtype == aoti_torch_dtype_int64();
}

template <class Name>
void expect_number(const char* op, const Name& name, const Tensor& t, const Place& place) {
  expect_scalar(op, name, t, place);
  if (!is_number(dtype_of(t))) fail(op, name, " must be float32, float64, int32 or int64, got ", dtype_name(dtype_of(t)));
}

inline void expect_group_size(const char* op, int64_t group_size) {
  if (group_size < 32 || group_size > 1024 || (group_size & (group_size - 1)) != 0)
    fail(op, "group_size must be a power of two from 32 to 1024, got ", group_size);
}

inline void expect_basis(const char* op, const Tensor& matrix, const Tensor& basis, bool left) {
  const int64_t d = matrix.size(left ? 0 : 1);
  if (basis.dim() != 2 || basis.size(0) != d)
    fail(op, "basis must have shape (", left ? "m" : "n", " = ", d, ", r) for left=", left ? "True" : "False", ", got ",
         tuple(basis.sizes()));
  if (basis.size(1) < 1) fail(op, "rank must be at least 1, got basis of shape ", tuple(basis.sizes()));
  expect_float(op, "basis", basis);
  expect_on(op, "basis", basis, place_of(matrix));
  expect_contiguous(op, "basis", basis);
}

// The name of a tensor of a list, spelled out only where a rule fails.
struct Item {
  const char* list;
  size_t index;
};

inline std::ostream& operator<<(std::ostream& out, const Item& item) { return out << item.list << "[" << item.index << "]"; }

struct Guards {
  const std::optional<Tensor>&grad_scale, &found_inf, &skipped;
};

inline void check_length(const char* op, const char* name, const Tensors& list, const char* first, const Tensors& model) {
  if (list.size() != model.size()) fail(op, name, " must have ", model.size(), " tensors like ", first, ", got ", list.size());
}

// `first` is the name of the list `params`; lr is null, and params are not empty, where the op has no rate. Unless the steps are
// `counted` they are numbers, which the op only reads.
inline void check_guards(const char* op, const char* first, const Tensors& params, const Tensors& steps, const Tensor* lr,
                         const Guards& guards, bool counted = true) {
  const Place place = place_of(params.empty() ? *lr : params[0]);
  if (lr != nullptr) expect_number(op, "lr", *lr, place);
  for (size_t i = 0; i < steps.size(); ++i) {
    const Item name{"steps", i};
    if (!counted) {
      const Place of_it = place_of(params[i]);
      steps.size() == 1 ? expect_number(op, "step", steps[i], of_it) : expect_number(op, name, steps[i], of_it);
      continue;
    }
    expect_scalar(op, name, steps[i], place_of(params[i]), true);
    expect_dtype(op, name, steps[i], aoti_torch_dtype_float32());
  }
  for (size_t i = 0; i < params.size(); ++i)
    if (place_of(params[i]) != place)
      fail(op, Item{first, i}, " must be on ", place, " like ", first, "[0], got ", place_of(params[i]));
  const std::pair<const char*, const std::optional<Tensor>&> flags[] = {{"grad_scale", guards.grad_scale},
                                                                        {"found_inf", guards.found_inf}};
  for (const auto& [name, flag] : flags) {
    if (!flag) continue;
    if (flag->numel() != 1) fail(op, name, " must have one element, got shape ", tuple(flag->sizes()));
    expect_dtype(op, name, *flag, aoti_torch_dtype_float32());
    expect_on(op, name, *flag, place);
  }
  if (guards.skipped) {
    expect_scalar(op, "skipped", *guards.skipped, place, true);
    expect_dtype(op, "skipped", *guards.skipped, aoti_torch_dtype_int64());
  }
}

inline void check_guards(const char* op, const Tensors& params, const Tensors& steps, const Tensor& lr, const Guards& guards) {
  check_guards(op, "params", params, steps, &lr, guards);
}

// Entry i of lists of parameters of any shape and their gradients.
inline void expect_param_and_grad(const char* op, size_t i, const Tensor& param, const Tensor& grad) {
  const Place place = place_of(param);
  expect_float(op, Item{"params", i}, param);
  expect_float(op, Item{"grads", i}, grad);
  expect_like(op, Item{"params", i}, param, param.sizes(), place);
  expect_like(op, Item{"grads", i}, grad, param.sizes(), place);
}

// A 0-dim tensor on the CPU that is a number.
inline double read_number(const Tensor& t) {
  const int32_t dtype = dtype_of(t);
  if (dtype == aoti_torch_dtype_float64()) return *static_cast<const double*>(t.data_ptr());
  if (dtype == aoti_torch_dtype_int64()) return double(*static_cast<const int64_t*>(t.data_ptr()));
  if (dtype == aoti_torch_dtype_int32()) return *static_cast<const int32_t*>(t.data_ptr());
  return *static_cast<const float*>(t.data_ptr());
}

inline Tensor empty(const Shape& shape, const Place& place, int32_t dtype = aoti_torch_dtype_float32()) {
  Shape strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * shape[i];
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides.data(), dtype, place.type, place.index, &out));
  return Tensor(out);
}

inline DType storage(const Tensor& t) {
  const int32_t dtype = dtype_of(t);
  if (dtype == aoti_torch_dtype_bfloat16()) return DType::bf16;
  return dtype == aoti_torch_dtype_float16() ? DType::f16 : DType::f32;
}

}  // namespace lowrank
