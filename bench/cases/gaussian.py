"""Products with a Gaussian basis that is made from its seed, which is never read, and the schedule of its seeds."""

import torch

from lowrank_sys import reference
from lowrank_sys.bench.cases.case import Op, low_rank, moments, refresh, scalars

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


def _key_inputs(case, randn):
    return {
        "key": torch.tensor([1, 2, 3, 0], device=case.device),
        "countdown": torch.tensor(0),
        **moments(low_rank(case), randn),
        **scalars(case),
    }


def _refresh_keys(f, t, case):
    t["countdown"].zero_()
    names = ("exp_avg", "exp_avg_sq")
    state = {key: t[key] for key in ("key", "countdown", *names, "step")}
    refresh(
        f, state, t["exp_avg"], t["lr"], {}, moments=names, kind="Gaussian", select="", transport="reset", left=case.left
    )  # fmt: skip
    return [t["key"], t["exp_avg"], t["exp_avg_sq"]]


def _next_key(tensors, *_, **__):
    key, _, exp_avg, exp_avg_sq, _ = tensors
    key[1] += 1
    _zero(exp_avg, exp_avg_sq)


def _zero(*tensors):
    for tensor in tensors:
        tensor.zero_()


MADE = "random numbers"
OPS = {
    "gaussian_basis_": Op(
        lambda case, randn: {"out": torch.zeros(_side(case), case.rank, dtype=case.dtype, device=case.device)},
        _basis,
        traffic=lambda c: c.element * c.basis,
        flop=lambda c: 60 * c.basis,
        bases={"randn": lambda t, c: lambda: t["out"].normal_()},
        overload="gaussian_basis_",
        oracle=reference.gaussian_basis_,
        exact=True,
        other=MADE,
    ),
    "gaussian_project": Op(
        lambda case, randn: {"grad": randn(case.m, case.n)},
        _project,
        traffic=lambda c: c.element * c.matrix + 4 * c.low_rank,
        flop=lambda c: 2 * c.matrix * c.rank,
        bases={"gemm": _gemm},
        overload="gaussian_project",
        oracle=reference.gaussian_project,
        other=MADE,
    ),
    "gaussian_back_project_": Op(
        _back_inputs,
        _back,
        traffic=lambda c: 2 * c.element * c.matrix + 4 * c.low_rank,
        flop=lambda c: 2 * c.matrix * c.rank,
        bases={"gemm": _gemm_back},
        overload="gaussian_back_project_",
        oracle=reference.gaussian_back_project_,
        other=MADE,
    ),
    "refresh_ keys": Op(
        _key_inputs,
        _refresh_keys,
        traffic=lambda c: 8 * c.low_rank + 64,
        flop=lambda c: 0,
        bases={"zero": lambda t, c: lambda: _zero(t["exp_avg"], t["exp_avg_sq"])},
        overload="refresh_",
        oracle=_next_key,
        exact=True,
        other="counters on the host",
    ),
}
