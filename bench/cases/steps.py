"""Optimizer steps."""

import torch
from torch.optim.adamw import adamw as torch_adamw

from lowrank_sys import reference
from lowrank_sys.bench.cases.case import (
    ADAM,
    COMPOSED,
    Op,
    adam_bytes,
    low_rank,
    moments,
    orthonormal,
    product_back,
    scalars,
    two_products,
)


def _galore_inputs(case, randn):
    return {
        "param": randn(case.m, case.n),
        "grad": randn(case.m, case.n),
        "basis": orthonormal(case, randn),
        **moments(low_rank(case), randn),
        **scalars(case),
    }


def _subspace_inputs(case, randn):
    return {
        "param": randn(case.m, case.n),
        "low_rank": randn(*low_rank(case), dtype=torch.float32),
        "basis": orthonormal(case, randn),
        **moments(low_rank(case), randn),
        **scalars(case),
    }


def _adamw_inputs(case, randn):
    return {"param": randn(case.m, case.n), "grad": randn(case.m, case.n), **moments((case.m, case.n), randn), **scalars(case)}


def _galore_step(f, t, case):
    f(
        t["param"],
        t["grad"],
        t["basis"],
        t["exp_avg"],
        t["exp_avg_sq"],
        step=t["step"],
        lr=t["lr"],
        scale=0.25,
        left=case.left,
        **ADAM,
    )
    return [t["param"], t["exp_avg"], t["exp_avg_sq"]]


def _subspace_step(f, t, case):
    f(
        t["param"],
        t["low_rank"],
        t["basis"],
        t["exp_avg"],
        t["exp_avg_sq"],
        step=t["step"],
        lr=t["lr"],
        scale=0.25,
        left=case.left,
        **ADAM,
    )
    return [t["param"], t["exp_avg"], t["exp_avg_sq"]]


def _adamw_step(f, t, case):
    f([t["param"]], [t["grad"]], [t["exp_avg"]], [t["exp_avg_sq"]], [t["step"]], lr=t["lr"], **ADAM)
    return [t["param"], t["exp_avg"], t["exp_avg_sq"]]


def _torch_adamw(params, grads, exp_avgs, exp_avg_sqs, steps, *, lr, fused=False, **hyper):
    torch_adamw(
        params, grads, exp_avgs, exp_avg_sqs, [], steps, foreach=False, fused=fused, lr=lr, amsgrad=False, maximize=False, **hyper
    )


def _fused_adamw(t, case):
    # torch keeps the moments in the dtype of the weights.
    lists = [[t[name].to(case.dtype)] for name in ("param", "grad", "exp_avg", "exp_avg_sq")]
    return lambda: _torch_adamw(*lists, [t["step"]], lr=0.1, fused=True, **ADAM)


OPS = {
    "galore_step": Op(
        _galore_inputs,
        _galore_step,
        traffic=lambda c: c.element * (3 * c.matrix + 2 * c.basis) + adam_bytes(c.low_rank),
        flop=lambda c: 4 * c.matrix * c.rank,
        bases={"gemms": two_products, **COMPOSED},
        overload="galore_step.tensor",
        oracle=reference.named("galore_step"),
    ),
    "subspace_step": Op(
        _subspace_inputs,
        _subspace_step,
        traffic=lambda c: c.element * (2 * c.matrix + c.basis) + 4 * c.low_rank + adam_bytes(c.low_rank),
        flop=lambda c: 2 * c.matrix * c.rank,
        bases={"gemm": product_back},
        overload="subspace_step.tensor",
        oracle=reference.named("subspace_step"),
    ),
    "adamw_step": Op(
        _adamw_inputs,
        _adamw_step,
        traffic=lambda c: c.element * 3 * c.matrix + adam_bytes(c.matrix),
        flop=lambda c: 12 * c.matrix,
        bases={"fused-adamw": _fused_adamw},
        overload="adamw_step",
        oracle=reference.adamw_step,
        ranked=False,
        sided=False,
        truth=_torch_adamw,
    ),
}
