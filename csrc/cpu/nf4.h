// NF4 weights on raw pointers.
#pragma once

#include "../core/nf4.h"
#include "coded.h"

namespace lowrank {

using Nf4Kernels = CodedKernels<Nf4Matrix>;

const Nf4Kernels& nf4_kernels();

}  // namespace lowrank
