// What the bindings of lowrank_sys._host share. They know numpy, not torch.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../core/dtype.h"
#include "../threads.h"

namespace lowrank {

namespace py = pybind11;

// Arrays are used in place: float32, or uint16 that holds the bits of bfloat16 or float16.
using Array = py::array;

template <class T>
T* data(Array& a) {
  return static_cast<T*>(a.mutable_data());
}

inline DType parse(const std::string& dtype) {
  if (dtype == "float32") return DType::f32;
  if (dtype == "bfloat16") return DType::bf16;
  if (dtype == "float16") return DType::f16;
  throw std::invalid_argument("dtype must be float32, bfloat16 or float16, got " + dtype);
}

// One function a group of block algorithms.
void bind_blockwise(py::module_& module);
void bind_gaussian(py::module_& module);
void bind_int4(py::module_& module);
void bind_int8(py::module_& module);
void bind_nf4(py::module_& module);
void bind_norms(py::module_& module);
void bind_philox(py::module_& module);
void bind_residual(py::module_& module);
void bind_scatter_add(py::module_& module);
void bind_sparse(py::module_& module);
void bind_steps(py::module_& module);
void bind_store(py::module_& module);

}  // namespace lowrank
