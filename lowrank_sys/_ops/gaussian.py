"""Products with a Gaussian basis that is made from its seed whenever it is used, and never kept."""

import torch

from lowrank_sys._ops.rules import define, expect, expect_dtype, expect_like, expect_matrix, fake
from lowrank_sys._ops.workspace import bound, fp32, split_parts, workspace

WHICH = "int seed, SymInt step, int parameter, SymInt first=0"

SCHEMAS = {
    # Rows first ... of the basis; step counts refreshes, first is the index of the projected axis in the unsharded tensor.
    "gaussian_basis_": f"(Tensor(a!) out, *, {WHICH}) -> ()",
    "gaussian_project": f"(Tensor grad, *, SymInt rank, bool left, {WHICH}) -> Tensor",
    "gaussian_back_project_": f"(Tensor(a!) param, Tensor low_rank, *, float alpha=1.0, float beta=1.0, bool left, {WHICH}) -> ()",
}


def expect_first(op, first):
    expect(first >= 0, op, lambda: f"first must be at least 0, got {first}")


def check_basis(out, first, *, op="gaussian_basis_"):
    expect_matrix(op, "out", out)
    expect_first(op, first)


def check_project(grad, rank, first, *, op="gaussian_project"):
    expect_matrix(op, "grad", grad)
    expect(rank >= 1, op, lambda: f"rank must be at least 1, got {rank}")
    expect_first(op, first)


def check_back_project(param, low_rank, left, first, *, op="gaussian_back_project_"):
    expect_matrix(op, "param", param)
    wanted = "(r, n)" if left else "(m, r)"
    expect(low_rank.dim() == 2, op, lambda: f"low_rank must be a matrix {wanted}, got shape {tuple(low_rank.shape)}")
    rank = low_rank.shape[0 if left else 1]
    expect(rank >= 1, op, lambda: f"rank must be at least 1, got low_rank of shape {tuple(low_rank.shape)}")
    expect_like(op, "low_rank", low_rank, (rank, param.shape[1]) if left else (param.shape[0], rank), param.device)
    expect_dtype(op, "low_rank", low_rank, torch.float32)
    expect_first(op, first)


define(SCHEMAS)


@fake("gaussian_basis_")
def _(out, *, seed, step, parameter, first=0):
    check_basis(out, first)


@fake("gaussian_project")
def _(grad, *, rank, left, seed, step, parameter, first=0):
    check_project(grad, rank, first)
    m, n = grad.shape
    return grad.new_empty((rank, n) if left else (m, rank), dtype=torch.float32)


@fake("gaussian_back_project_")
def _(param, low_rank, *, alpha=1.0, beta=1.0, left, seed, step, parameter, first=0):
    check_back_project(param, low_rank, left, first)


@workspace("gaussian_project", "gaussian_back_project_")
def _(matrix, low_rank=None, *, left, rank=None, cuda=False, **_):
    if not cuda:
        return bound(matrix, low_rank)
    rank = low_rank.shape[0 if left else 1] if rank is None else rank
    d, channels = matrix.shape if left else matrix.shape[::-1]
    return fp32(d, rank) + (split_parts(matrix, rank * channels) if low_rank is None else 0)
