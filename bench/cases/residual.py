"""Steps that use the part of the gradient that a basis does not hold: G is read twice, W read and written once."""

import torch

from lowrank_sys import reference
from lowrank_sys.bench.cases.case import ADAM, Op, adam_bytes, low_rank, moments, orthonormal, product, scalars, two_products


def _inputs(case, randn, **more):
    return {
        "param": randn(case.m, case.n),
        "grad": randn(case.m, case.n),
        "basis": orthonormal(case, randn),
        **moments(low_rank(case), randn),
        **more,
        **scalars(case),
    }


def _limited_inputs(case, randn):
    return _inputs(case, randn, limiter=torch.zeros((), device=case.device))


def _sign_inputs(case, randn):
    """With no residual near 0, where its sign is a matter of rounding."""
    found = _inputs(case, randn)
    grad, basis = found["grad"].float(), found["basis"].float()
    residual = grad - reference.galore.back(reference.project(grad, basis, left=case.left), basis, case.left)
    found["grad"] = (grad + 0.01 * (residual.abs() < 1e-3)).to(case.dtype)
    return found


def _call(*state, **hyper):
    names = ("param", "grad", "basis", "exp_avg", "exp_avg_sq", *state)

    def call(f, t, case):
        f(*(t[name] for name in names), step=t["step"], lr=t["lr"], left=case.left, **hyper, **ADAM)
        return [t["param"], t["exp_avg"], t["exp_avg_sq"]]

    return call


def _three_products(t, case):
    project, others = product(t, case), two_products(t, case)

    def run():
        project()
        others()

    return run


def _traffic(bases):
    return lambda c: c.element * (4 * c.matrix + bases * c.basis) + adam_bytes(c.low_rank)


OPS = {
    "apollo_step": Op(
        _limited_inputs,
        _call("limiter", scale=1.0),
        traffic=_traffic(1),
        flop=lambda c: 2 * c.matrix * c.rank,
        bases={"gemm": product},
        overload="apollo_step.tensor",
        oracle=reference.named("apollo_step"),
    ),
    "fira_step": Op(
        _limited_inputs,
        _call("limiter", alpha=0.25),
        traffic=_traffic(2),
        flop=lambda c: 4 * c.matrix * c.rank,
        bases={"gemms": two_products},
        overload="fira_step.tensor",
        oracle=reference.named("fira_step"),
    ),
    "frugal_step": Op(
        _sign_inputs,
        _call(scale=1.0, residual_scale=0.1, sign=True),
        traffic=_traffic(2),
        flop=lambda c: 6 * c.matrix * c.rank,
        bases={"gemms": _three_products},
        overload="frugal_step.tensor",
        oracle=reference.named("frugal_step"),
    ),
}
