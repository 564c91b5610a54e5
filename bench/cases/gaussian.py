"""Products with a Gaussian basis that is made from its seed: it is never read."""

import torch

from lowrank_sys import reference
from lowrank_sys.bench.cases.case import Op, low_rank

WHICH = {"seed": 1, "step": 2, "parameter": 3}


def _side(case):
    return case.m if case.left else case.n


def _basis(f, t, case):
    f(t["out"], **WHICH)
    return [t["out"]]


def _project(f, t, case):
    return [f(t["grad"], rank=case.rank, left=case.left, **WHICH)]


def _back_inputs(case, randn):
    return {"param": randn(case.m, case.n), "low_rank": randn(*low_rank(case), dtype=torch.float32)}


def _back(f, t, case):
    f(t["param"], t["low_rank"], alpha=0.25, beta=0.99, left=case.left, **WHICH)
    return [t["param"]]


def _stored(case, device):
    """The basis in memory."""
    return torch.randn(_side(case), case.rank, dtype=case.dtype, device=device)


def _gemm(t, case):
    basis = _stored(case, t["grad"].device)
    out = t["grad"].new_empty(low_rank(case))
    return (lambda: torch.mm(basis.T, t["grad"], out=out)) if case.left else (lambda: torch.mm(t["grad"], basis, out=out))


def _gemm_back(t, case):
    basis, x = _stored(case, t["param"].device), t["low_rank"].to(case.dtype)
    a, b = (basis, x) if case.left else (x, basis.T)
    return lambda: t["param"].addmm_(a, b, beta=0.99, alpha=0.25)


OPS = {
    "gaussian_basis_": Op(
        lambda case, randn: {"out": torch.zeros(_side(case), case.rank, dtype=case.dtype, device=case.device)}, _basis,
        traffic=lambda c: c.element * c.basis, flop=lambda c: 60 * c.basis,
        bases={"randn": lambda t, c: lambda: t["out"].normal_()}, overload="gaussian_basis_",
        oracle=reference.gaussian_basis_, exact=True),
    "gaussian_project": Op(
        lambda case, randn: {"grad": randn(case.m, case.n)}, _project,
        traffic=lambda c: c.element * c.matrix + 4 * c.low_rank, flop=lambda c: 2 * c.matrix * c.rank,
        bases={"gemm": _gemm}, overload="gaussian_project", oracle=reference.gaussian_project),
    "gaussian_back_project_": Op(
        _back_inputs, _back,
        traffic=lambda c: 2 * c.element * c.matrix + 4 * c.low_rank, flop=lambda c: 2 * c.matrix * c.rank,
        bases={"gemm": _gemm_back}, overload="gaussian_back_project_", oracle=reference.gaussian_back_project_),
}
