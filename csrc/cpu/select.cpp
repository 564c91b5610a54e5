// Which of the compiled instruction sets serves on this processor.
#include "blockwise.h"
#include "gaussian.h"
#include "gemm.h"
#include "int4.h"
#include "int8.h"
#include "int8_gemm.h"
#include "nf4.h"
#include "norms.h"
#include "residual.h"
#include "scatter_add.h"
#include "sparse.h"
#include "steps.h"
#include "store.h"

#ifdef LR_X86
namespace lowrank {
namespace {

bool has_v4() {
  static const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                         __builtin_cpu_supports("avx512vl");
  return v4;
}

bool has_vnni() {
  static const bool vnni = has_v4() && __builtin_cpu_supports("avx512vnni");
  return vnni;
}

}  // namespace
}  // namespace lowrank

#define LR_SELECT(Type, name)                                                                           \
  namespace lowrank {                                                                                   \
  namespace x86_64_v3 {                                                                                 \
  extern const Type name##_table;                                                                       \
  }                                                                                                     \
  namespace x86_64_v4 {                                                                                 \
  extern const Type name##_table;                                                                       \
  }                                                                                                     \
  const Type& name##_kernels() { return has_v4() ? x86_64_v4::name##_table : x86_64_v3::name##_table; } \
  }

// Kernels that have a third build, for the dot products of bytes.
#define LR_SELECT_VNNI(Type, name)                                                                                   \
  namespace lowrank {                                                                                                \
  namespace x86_64_v3 {                                                                                              \
  extern const Type name##_table;                                                                                    \
  }                                                                                                                  \
  namespace x86_64_v4 {                                                                                              \
  extern const Type name##_table;                                                                                    \
  }                                                                                                                  \
  namespace x86_64_v4_vnni {                                                                                         \
  extern const Type name##_table;                                                                                    \
  }                                                                                                                  \
  const Type& name##_kernels() {                                                                                     \
    return has_vnni() ? x86_64_v4_vnni::name##_table : has_v4() ? x86_64_v4::name##_table : x86_64_v3::name##_table; \
  }                                                                                                                  \
  }
#else
#define LR_SELECT(Type, name)                                     \
  namespace lowrank {                                             \
  namespace portable {                                            \
  extern const Type name##_table;                                 \
  }                                                               \
  const Type& name##_kernels() { return portable::name##_table; } \
  }
#define LR_SELECT_VNNI LR_SELECT
#endif

LR_SELECT(BlockwiseKernels, blockwise)
LR_SELECT(GaussianKernels, gaussian)
LR_SELECT(GemmKernels, gemm)
LR_SELECT(Int4Kernels, int4)
LR_SELECT(Int8Kernels, int8)
LR_SELECT_VNNI(Int8GemmKernels, int8_gemm)
LR_SELECT(Nf4Kernels, nf4)
LR_SELECT(NormKernels, norm)
LR_SELECT(ResidualKernels, residual)
LR_SELECT(ScatterAddKernels, scatter_add)
LR_SELECT(SparseKernels, sparse)
LR_SELECT(StepKernels, step)
LR_SELECT(StoreKernels, store)
