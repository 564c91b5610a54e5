// Launchers of the CUDA kernels: enqueue on a stream, never wait.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../core/dtype.h"
#include "../core/rounding.h"

namespace lowrank {

// Tensors that one launch updates; the whole list is a kernel argument.
struct AdamWList {
  static constexpr int kMost = 60;
  struct Item {
    void* w;
    const void* g;
    float *m, *v, *step;
    int64_t numel;
  };
  Item items[kMost];
  int count = 0;
};

// Such a list whose weights are rounded stochastically, with where the random bits of each are.
template <class List, int MOST>
struct DrawnList {
  static constexpr int kMost = MOST;
  struct Item : List::Item {
    uint32_t parameter;
    uint64_t offset;
  };
  Item items[kMost];
  int count = 0;
};

using DrawnAdamWList = DrawnList<AdamWList, 52>;

// A 0-dim tensor: read on the device where `device` is set.
struct Number {
  enum class Type : int { host, f32, f64, i32, i64 };
  Type type;
  const void* device;
  double host;
};

struct AdamWScalars {
  double beta1, beta2, eps, weight_decay;
  Number lr;
  const float *grad_scale, *found_inf;  // may be null
  int64_t* skipped;                     // may be null
};

// Counters of steps.
struct StepList {
  float* steps[AdamWList::kMost];
  int count = 0;

  template <class List>
  static StepList of(const List& list) {
    static_assert(List::kMost <= AdamWList::kMost);
    StepList steps;
    for (; steps.count < list.count; ++steps.count) steps.steps[steps.count] = list.items[steps.count].step;
    return steps;
  }
};

// Adds 1 to every step unless found_inf.
cudaError_t launch_advance(const StepList& list, const float* found_inf, cudaStream_t stream);

// One AdamW step of tensors that all have these dtypes.
cudaError_t launch_adamw(DType w, DType g, const AdamWList& list, const AdamWScalars& scalars, cudaStream_t stream);
cudaError_t launch_adamw(DType w, DType g, const DrawnAdamWList& list, const AdamWScalars& scalars, uint64_t seed,
                         cudaStream_t stream);

// Fills n weights with fp32 values; rounding.stream.step is read from `step` on the device where it lies there.
cudaError_t launch_round(DType dtype, void* w, const float* values, int64_t n, const Rounding& rounding, const Number& step,
                         cudaStream_t stream);

// norms of the rows, or of the columns, of g (rows, columns), row-major.
cudaError_t launch_row_norms(DType dtype, const void* g, float* norms, int64_t rows, int64_t columns, cudaStream_t stream);
cudaError_t launch_column_norms(DType dtype, const void* g, float* norms, int64_t rows, int64_t columns, cudaStream_t stream);

}  // namespace lowrank
