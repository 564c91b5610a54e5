"""Products with a basis, and the norms of channels."""

import torch

from lowrank_sys import reference
from lowrank_sys.bench.cases.case import Op, low_rank, orthonormal, product, product_back


def _project_inputs(case, randn):
    return {"grad": randn(case.m, case.n), "basis": orthonormal(case, randn)}


def _back_project_inputs(case, randn):
    return {
        "param": randn(case.m, case.n),
        "low_rank": randn(*low_rank(case), dtype=torch.float32),
        "basis": orthonormal(case, randn),
    }


def _norms_inputs(case, randn):
    return {"grad": randn(case.m, case.n)}


def _back_project(f, t, case):
    # beta < 1 keeps the weights bounded over many calls.
    f(t["param"], t["low_rank"], t["basis"], alpha=0.25, beta=0.99, left=case.left)
    return [t["param"]]


OPS = {
    "project": Op(
        _project_inputs,
        lambda f, t, c: [f(t["grad"], t["basis"], left=c.left)],
        traffic=lambda c: c.element * (c.matrix + c.basis) + 4 * c.low_rank,
        flop=lambda c: 2 * c.matrix * c.rank,
        bases={"gemm": product},
        overload="project",
        oracle=reference.project,
    ),
    "back_project_": Op(
        _back_project_inputs,
        _back_project,
        traffic=lambda c: c.element * (2 * c.matrix + c.basis) + 4 * c.low_rank,
        flop=lambda c: 2 * c.matrix * c.rank,
        bases={"gemm": product_back},
        overload="back_project_",
        oracle=reference.back_project_,
    ),
    "channel_norms": Op(
        _norms_inputs,
        lambda f, t, c: [f(t["grad"], left=c.left)],
        traffic=lambda c: c.element * c.matrix + 4 * (c.n if c.left else c.m),
        flop=lambda c: 2 * c.matrix,
        bases={"vector_norm": lambda t, c: lambda: torch.linalg.vector_norm(t["grad"], dim=0 if c.left else 1)},
        overload="channel_norms",
        oracle=reference.channel_norms,
        ranked=False,
    ),
}
