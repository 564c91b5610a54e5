// What the CUDA ops share: the current stream, and scalars that may lie on the device.
#pragma once

#include <map>

#include "../../cuda/launch.h"
#include "../rounding.h"

namespace lowrank {

using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// A number of any type: on the CPU it is read now, on the device by the kernel.
inline Number number(const Tensor& t) {
  if (t.is_cpu()) return {Number::Type::host, nullptr, read_number(t)};
  const int32_t dtype = dtype_of(t);
  const Number::Type type = dtype == aoti_torch_dtype_float64() ? Number::Type::f64
                            : dtype == aoti_torch_dtype_int32() ? Number::Type::i32
                            : dtype == aoti_torch_dtype_int64() ? Number::Type::i64
                                                                : Number::Type::f32;
  return {type, t.data_ptr(), 0};
}

inline const float* pointer(const std::optional<Tensor>& t) { return t ? static_cast<const float*>(t->data_ptr()) : nullptr; }

inline AdamWScalars adamw_scalars(double beta1, double beta2, double eps, double weight_decay, const Tensor& lr,
                                  const Guards& guards) {
  return {beta1,
          beta2,
          eps,
          weight_decay,
          number(lr),
          pointer(guards.grad_scale),
          pointer(guards.found_inf),
          guards.skipped ? static_cast<int64_t*>(guards.skipped->data_ptr()) : nullptr};
}

// Launches `count` items in lists of equal key and at most List::kMost. key(i), item(i); launch(key, list) enqueues one.
template <class List, class KeyOf, class ItemOf, class Launch>
void launch_lists(size_t count, const KeyOf& key, const ItemOf& item, const Launch& launch) {
  std::map<decltype(key(size_t())), List> lists;
  for (size_t i = 0; i < count; ++i) {
    const auto k = key(i);
    List& list = lists[k];
    list.items[list.count++] = item(i);
    if (list.count < List::kMost) continue;
    launch(k, list);
    list.count = 0;
  }
  for (const auto& [k, list] : lists)
    if (list.count > 0) launch(k, list);
}

// The same, in lists with the random bits of each item where weights are rounded stochastically; launch then gets the seed too.
template <class List, class Drawn, class KeyOf, class ItemOf, class Launch>
void launch_rounded(size_t count, const Draws& draws, const KeyOf& key, const ItemOf& item, const Launch& launch) {
  if (!draws.stochastic) return launch_lists<List>(count, key, item, launch);
  launch_lists<Drawn>(
      count, key, [&](size_t i) { return typename Drawn::Item{item(i), uint32_t(draws.parameter(i)), uint64_t(draws.offset(i))}; },
      [&](const auto& k, const Drawn& list) { launch(k, list, uint64_t(draws.seed)); });
}

}  // namespace lowrank
