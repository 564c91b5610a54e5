"""The weight of a layer that is low-rank plus sparse."""

import itertools

from lowrank_sys.bench.static.kernel import FLOATS, Kernel
from lowrank_sys.kernels import configs
from lowrank_sys.kernels.scatter_add import scatter_add_product_kernel

RANK = 128  # of the table's rows


def calls(kind):
    """Types of B, A, the values and W: a layer has one type, and W may have another."""
    types = [(own, own, own, out) for own, out in itertools.product(FLOATS, FLOATS)]
    narrow = [call for call in types if "fp32" not in call and len(set(call[:2])) == 1]
    return [(call, "plain") for call in {16: narrow, 32: [c for c in types if c not in narrow], "odd": types}[kind]]


def always(kind, rank):
    if rank != RANK:
        return []
    return {16: [(("bf16",) * 4, "plain")], 32: [(("fp32",) * 4, "plain")]}.get(kind, [])


def tensors(types, variant):
    pointers = {name: f"*{type_}" for name, type_ in zip(("b", "a", "values", "out"), types)}
    return pointers | {"columns": "*i32", "k": "i32", "steps": "i32", "scale": "fp32"}


def rows(arch):
    """The tiles of back(X), which this product is with another epilogue."""
    return {
        (kind, rank): config
        for (kernel, kind), by_rank in configs.of_arch(configs.TABLES, arch).items()
        if kernel == "back_project"
        for rank, config in by_rank.items()
    }


KERNELS = {"scatter_add_product": Kernel(scatter_add_product_kernel, rows, calls, tensors, always=always)}
