"""The weight of a layer that is low-rank plus sparse."""

import itertools

from lowrank_sys.bench.static.kernel import FLOATS, Kernel
from lowrank_sys.kernels import configs
from lowrank_sys.kernels.scatter_add import scatter_add_product_kernel


def calls(kind):
    """Types of B, A, the values and W: a layer has one type, and W may have another."""
    return [((own, own, own, out), "plain") for own, out in itertools.product(FLOATS, FLOATS)]


def tensors(types, variant):
    pointers = {name: f"*{type_}" for name, type_ in zip(("b", "a", "values", "out"), types)}
    return pointers | {"columns": "*i32", "k": "i32", "steps": "i32", "scale": "fp32"}


def rows(arch):
    return {(kind, 0): config for kind, config in configs.SCATTER_ADD.items()}


def always(kind, rank):
    """The widest type one by one: no other build takes as many registers."""
    return [(("fp32",) * 4, "plain")] if kind == "odd" else []


KERNELS = {"scatter_add_product": Kernel(scatter_add_product_kernel, rows, calls, tensors, always=always)}
