"""A Gaussian basis from its seed, and products with it."""

import torch

from cases.bounds import added, assert_within, exact, scaled
from cases.case import Case, exactly
from cases.draw import FLOATS
from cases.projection import back_of, low_rank, product_of
from lowrank_sys.reference.gaussian import gaussian_basis, gaussian_basis_


def which(draw):
    return dict(
        seed=draw.of(0, 1, -5, 2**63 - 1),
        step=draw.of(0, 1, 2**31),
        parameter=draw.of(0, 7),
        first=draw.of(0, 1, 63, 64, 1000, 2**35),
    )


def basis_of(before, d, rank):
    return gaussian_basis(d, rank, **{name: before[name] for name in ("seed", "step", "parameter", "first")})


def in_full(basis, d, rank):
    """A basis (d, r) as it is, or that of a key: int64 (4,)."""
    if basis.dtype != torch.int64:
        return basis
    return gaussian_basis(d, rank, **dict(zip(("seed", "step", "parameter", "first"), basis.tolist())))


def basis_arguments(draw):
    return dict(out=draw.values(draw.size(), draw.size(1, 129), dtype=draw.of(*FLOATS))) | which(draw)


def project_arguments(draw):
    return dict(
        grad=draw.values(draw.size(), draw.size(), dtype=draw.of(*FLOATS)), rank=draw.size(1, 65), left=draw.of(True, False)
    ) | which(draw)


def compare_project(before, after, result):
    grad, left = before["grad"], before["left"]
    assert result.dtype == torch.float32 and result.is_contiguous()
    assert_within("R", result, product_of(grad, basis_of(before, grad.shape[0 if left else 1], before["rank"]), left))


def back_project_arguments(draw):
    m, n, r, left = draw.size(), draw.size(), draw.size(1, 65), draw.of(True, False)
    return dict(
        param=draw.values(m, n, dtype=draw.of(*FLOATS)),
        low_rank=draw.values(*low_rank(m, n, r, left)),
        alpha=draw.of(1.0, -0.25, 1e-3),
        beta=draw.of(1.0, 0.0, 0.5, -2.0),
        left=left,
    ) | which(draw)


def compare_back_project(before, after, result):
    axis = 0 if before["left"] else 1
    basis = basis_of(before, before["param"].shape[axis], before["low_rank"].shape[axis])
    back = back_of(exact(before["low_rank"]), basis, before["left"])
    param = before["param"] if before["beta"] else torch.zeros_like(before["param"])  # as in BLAS, 0 * NaN is 0
    assert_within("param", after["param"], added(scaled(before["beta"], exact(param)), scaled(before["alpha"], back)))


CASES = {
    "gaussian_basis_": Case(basis_arguments, exactly(gaussian_basis_)),
    "gaussian_project": Case(project_arguments, compare_project),
    "gaussian_back_project_": Case(back_project_arguments, compare_back_project),
}
