"""Stochastic rounding of weights."""

import torch

from lowrank_sys import reference
from lowrank_sys.bench.cases.case import Op, copy_of, scalars


def _inputs(case, randn):
    return {"param": randn(case.m, case.n), "values": randn(case.m, case.n, dtype=torch.float32), **scalars(case)}


def _round(f, t, case):
    f(t["param"], t["values"], seed=1, step=t["step"], parameter=0)
    return [t["param"]]


def _bytes(case):
    return (4 + case.element) * case.matrix


OPS = {
    "round_stochastic_": Op(
        _inputs,
        _round,
        traffic=_bytes,
        flop=lambda c: 3 * c.matrix,
        bases={"copy": copy_of(_bytes)},
        overload="round_stochastic_",
        oracle=reference.round_stochastic_,
        ranked=False,
        sided=False,
        exact=True,
    )
}
