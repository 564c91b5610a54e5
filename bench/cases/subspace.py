"""Choosing a basis."""

import torch

from lowrank_sys import reference
from lowrank_sys.bench.cases.case import Op, low_rank, moments, orthonormal, refresh, scalars
from lowrank_sys.subspace.iteration import (
    MIX,
    basis_from_sketch,
    gaussian,
    sketch_directions,
    sketched_columns,
    subspace_iteration,
    unit_columns,
)

N_ITER = 2


def _columns(case):
    return sketched_columns(case.rank, case.m, case.n)


def _sides(case):
    """The axis that is projected, and the other."""
    return (case.m, case.n) if case.left else (case.n, case.m)


def _iteration_inputs(case, randn):
    # Singular values that fall off as 1/i, and an old basis that knows nothing of G.
    k = min(case.m, case.n)
    decay = 1 / torch.arange(1, k + 1, device=case.device)
    grad = (randn(case.m, k, dtype=torch.float32) * decay) @ randn(k, case.n, dtype=torch.float32)
    return {"grad": (grad / grad.std()).to(case.dtype), "basis": orthonormal(case, randn)}


def _refresh_inputs(case, randn):
    return _iteration_inputs(case, randn) | {"countdown": torch.tensor(0)} | scalars(case)


def _sketch_inputs(case, randn):
    t = _refresh_inputs(case, randn)
    omega = torch.linalg.qr(randn(_sides(case)[1], _columns(case), dtype=torch.float32)).Q.contiguous()
    return t | {"sketch": reference.project(t["grad"], omega, left=not case.left).contiguous()}


def _refresh(f, t, case):
    """A refresh that is due, from the gradient or, where there is one, from its sketch; moments are kept."""
    t["countdown"].zero_()
    sketched = "sketch" in t
    refresh(
        f, {key: t[key] for key in ("basis", "countdown")}, t["sketch" if sketched else "grad"], t["lr"], {"seed": 0},
        kind="Orthonormal", select="randomized", transport="keep", left=case.left, sketched=sketched,
    )  # fmt: skip
    return [t["basis"]]


def _refreshed(tensors, gradients, *_, left, sketched, **__):
    old, matrix = tensors[0], gradients[0]
    if sketched:
        old.copy_(basis_from_sketch(matrix, old, left=left, seed=0)[0])
    else:
        old.copy_(subspace_iteration(matrix, old, rank=old.shape[1], left=left, n_iter=1, seed=0)[0])


def _directions_inputs(case, randn):
    return {"basis": orthonormal(case, randn), "exp_avg": moments(low_rank(case), randn)["exp_avg"]}


def _directions_truth(basis, exp_avg, *, other, left, seed=0):
    """The Q of a QR in fp64 of the same columns: the Gaussian is drawn in fp32, R has a positive diagonal."""
    d, rank = basis.shape
    omega = unit_columns(gaussian(other, sketched_columns(rank, d, other), seed, basis.float())).double()
    omega[:, :rank] = unit_columns(exp_avg.T if left else exp_avg) + MIX * omega[:, :rank]
    q, r = torch.linalg.qr(omega)
    return q * r.diagonal().sign()


def _products(t, case):
    """The bare GEMMs of a refresh: to the other side and back."""
    grad = t["grad"]
    d, other = _sides(case)
    y, z = grad.new_ones(d, _columns(case)), grad.new_ones(other, _columns(case))
    g = grad if case.left else grad.T

    def run():
        torch.mm(g.T, y, out=z)
        torch.mm(g, z, out=y)

    return run


def _svd(t, case):
    return lambda: torch.linalg.svd(t["grad"].float(), full_matrices=False)


def _qr_of(rows):
    """torch's QR of as many columns."""
    return lambda t, c: (lambda y: lambda: torch.linalg.qr(y))(torch.randn(rows(c), _columns(c), device=c.device))


FACTORS = "factorizations"
# The products with G on r + r/8 columns are counted; in what has no product with G, those with its columns, and of the l x l
# matrices nothing.
OPS = {
    "subspace_iteration": Op(
        _iteration_inputs,
        lambda f, t, c: list(f(t["grad"], t["basis"], rank=c.rank, left=c.left, n_iter=N_ITER)),
        traffic=lambda c: 2 * N_ITER * c.element * c.matrix,
        flop=lambda c: 4 * N_ITER * c.matrix * _columns(c),
        bases={"svd": _svd},
        overload="subspace_iteration",
        oracle=subspace_iteration,
        chooses=True,
        other=FACTORS,
    ),
    "refresh_": Op(
        _refresh_inputs,
        _refresh,
        traffic=lambda c: 2 * c.element * (c.matrix + c.basis),
        flop=lambda c: 4 * c.matrix * _columns(c),
        bases={"gemms": _products, "svd": _svd},
        overload="refresh_",
        oracle=_refreshed,
        chooses=True,
        other=FACTORS,
    ),
    "refresh_ sketched": Op(
        _sketch_inputs,
        _refresh,
        traffic=lambda c: 4 * _sides(c)[0] * _columns(c) + 2 * c.element * c.basis,
        flop=lambda c: 2 * _sides(c)[0] * (_columns(c) ** 2 + _columns(c) * c.rank + 6 * c.rank**2),
        bases={"qr": _qr_of(lambda c: _sides(c)[0])},
        overload="refresh_",
        oracle=_refreshed,
        chooses=True,
        other=FACTORS,
    ),
    "sketch_directions": Op(
        _directions_inputs,
        lambda f, t, c: [f(t["basis"], t["exp_avg"], other=_sides(c)[1], left=c.left)],
        traffic=lambda c: 4 * c.low_rank + c.element * _sides(c)[1] * _columns(c),
        flop=lambda c: 12 * _sides(c)[1] * _columns(c) ** 2,
        bases={"qr": _qr_of(lambda c: _sides(c)[1])},
        overload="sketch_directions",
        oracle=sketch_directions,
        truth=_directions_truth,
        other=FACTORS,
    ),
}
