"""A basis of columns of the orthonormal DCT-II matrix: only their indices are stored."""

import torch

from lowrank_sys._ops.rules import define, expect, expect_dtype, expect_like, expect_matrix, fake

NORMS = (1, 2)

SCHEMAS = {
    # The r columns of S = G D (left: rows of Dᵀ G) of the largest norm, l1 or l2, and these norms.
    "dct_select": "(Tensor grad, *, SymInt rank, bool left, int norm=1) -> (Tensor indices, Tensor norms)",
    # D[:, indices], (d, r)
    "dct_columns": "(Tensor indices, *, SymInt d) -> Tensor",
}


def check_dct_select(grad, *, rank, left, norm, op="dct_select"):
    expect_matrix(op, "grad", grad)
    d = grad.shape[0 if left else 1]
    expect(rank >= 1, op, lambda: f"rank must be at least 1, got {rank}")
    expect(rank <= d, op, lambda: f"rank must be at most {'m' if left else 'n'} = {d} for left={left}, got {rank}")
    expect(norm in NORMS, op, lambda: f"norm must be 1 or 2, got {norm}")


def check_dct_columns(indices, *, d, op="dct_columns"):
    expect(indices.dim() == 1, op, lambda: f"indices must be a vector (r,), got shape {tuple(indices.shape)}")
    expect_like(op, "indices", indices, indices.shape, indices.device)
    expect_dtype(op, "indices", indices, torch.int32)
    expect(d >= 1, op, lambda: f"d must be at least 1, got {d}")


define(SCHEMAS)


@fake("dct_select")
def _(grad, *, rank, left, norm=1):
    check_dct_select(grad, rank=rank, left=left, norm=norm)
    return grad.new_empty((rank,), dtype=torch.int32), grad.new_empty((rank,), dtype=torch.float32)


@fake("dct_columns")
def _(indices, *, d):
    check_dct_columns(indices, d=d)
    return indices.new_empty((d, indices.shape[0]), dtype=torch.float32)
