// Which of the compiled instruction sets serves on this processor.
#include "kernels.h"

namespace lowrank {

#ifdef LR_X86
namespace x86_64_v3 {
extern const Kernels table;
}
namespace x86_64_v4 {
extern const Kernels table;
}

const Kernels& kernels() {
  static const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                         __builtin_cpu_supports("avx512vl");
  return v4 ? x86_64_v4::table : x86_64_v3::table;
}
#else
namespace portable {
extern const Kernels table;
}

const Kernels& kernels() { return portable::table; }
#endif

}  // namespace lowrank
