"""The weight of a layer that is low-rank plus sparse, made anew for a product with it."""

import torch

from lowrank_sys.bench.cases.case import Op
from lowrank_sys.reference.scatter_add import scatter_add_product

DENSITY, SCALE = 0.03, 0.25


def entries(case):
    """Of a row of S."""
    return max(1, round(DENSITY * case.n))


def _inputs(case, randn):
    # Spread over the row, each row from another column on.
    first = torch.arange(case.m, device=case.device)[:, None] + torch.arange(entries(case), device=case.device) * (
        case.n // entries(case)
    )
    return {
        "b": randn(case.m, case.rank),
        "a": randn(case.rank, case.n),
        "values": randn(case.m, entries(case)),
        "columns": (first % case.n).sort(1).values.int(),
    }


def _call(f, t, case):
    return [f(t["b"], t["a"], t["values"], t["columns"], scale=SCALE)]


def _gemm(t, case):
    out = t["b"].new_empty(case.m, case.n)
    return lambda: torch.mm(t["b"], t["a"], out=out)


def _gemm_scatter(t, case):
    """The authors' way: the product, and a scatter-add by flat indices of 64 bits."""
    rows = torch.arange(case.m, device=case.device)[:, None]
    flat, values = (rows * case.n + t["columns"]).reshape(-1), t["values"].reshape(-1)
    return lambda: torch.mm(t["b"], SCALE * t["a"]).view(-1).scatter_add_(0, flat, values)


OPS = {
    "scatter_add_product": Op(
        _inputs,
        _call,
        traffic=lambda c: c.element * (c.rank * (c.m + c.n) + c.matrix) + (4 + c.element) * c.m * entries(c),
        flop=lambda c: 2 * c.rank * c.matrix,
        bases={"gemm": _gemm, "gemm-scatter": _gemm_scatter},
        overload="scatter_add_product",
        oracle=scatter_add_product,
        sided=False,
    )
}
