#include "nf4.h"

#include "coded_groups.h"

namespace lowrank {
inline namespace LR_ISA {

extern const Nf4Kernels nf4_table;
const Nf4Kernels nf4_table = {run_quantize<Nf4Matrix>, run_dequantize<Nf4Matrix>};

}  // namespace LR_ISA
}  // namespace lowrank
