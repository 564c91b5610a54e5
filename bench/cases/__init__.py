"""What the microbenchmark knows of each op: inputs, the call, counted bytes and FLOP, and what it is compared with.

Bytes count each operand once per kernel that must read or write it: the least traffic of the op as designed, so caches and
temporaries of an implementation do not raise its GB/s. FLOP count the products.

One module a group of ops.
"""

import torch

from lowrank_sys import backends
from lowrank_sys.bench.cases import (
    blockwise,
    gaussian,
    int4,
    int8,
    int8_gemm,
    nf4,
    projection,
    qgalore,
    residual,
    rounding,
    scatter_add,
    sparse,
    steps,
    subspace,
    transforms,
)
from lowrank_sys.bench.cases.case import Case as Case

GROUPS = (
    steps,
    projection,
    int8_gemm,
    int4,
    subspace,
    int8,
    nf4,
    sparse,
    transforms,
    blockwise,
    gaussian,
    residual,
    qgalore,
    rounding,
    scatter_add,
)
OPS = {name: op for group in GROUPS for name, op in group.OPS.items()}

# Timed once: at 4096 x 4096 it takes most of a minute.
ONCE = ("svd",)
# Bases that are packages: (module, what to install).
PACKAGES = {"bitsandbytes": ("bitsandbytes", "bitsandbytes"), "torchao": ("torchao", "torchao")}


def make(case):
    """Fresh inputs of a case, the same at every call."""
    generator = torch.Generator(case.device).manual_seed(0)

    def randn(*shape, dtype=case.dtype):
        return torch.randn(shape, generator=generator, device=case.device).to(dtype)

    return OPS[case.op].inputs(case, randn)


def serving(case):
    """(who serves the op, the function)."""
    wanted = (OPS[case.op].overload, torch.device(case.device).type)
    name = next(row.implementation for row in backends.table() if (row.op, row.device) == wanted)
    return name, getattr(torch.ops.lowrank, OPS[case.op].overload.partition(".")[0])


def copies(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def double(tensors):
    return {name: tensor.double() if tensor.is_floating_point() else tensor.clone() for name, tensor in tensors.items()}
