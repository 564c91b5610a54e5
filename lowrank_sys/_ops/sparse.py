"""Structured sparse projections (Grass): the basis is r rows, or columns, of the identity, each with a scale.

The selected rows are those of G's projected axis: rows of G if left, columns if right. `indices` (r,) int32 names them and
`scale` (r,) fp32 is the diagonal rho of the projection, None for ones.
"""

import torch

from lowrank_sys._ops.rules import define, expect, expect_dtype, expect_like, expect_matrix, fake

METHODS = ("top", "sample", "sample_replace")
# Rows are counted in fp32.
MOST_ROWS = 2**24

SCHEMAS = {
    # 2-norms of what select_rows chooses from: rows of G if left, columns if right.
    "row_norms": "(Tensor grad, *, bool left) -> Tensor",
    "select_rows": "(Tensor norms, *, SymInt r, str method, int seed=0, SymInt step=0, int parameter=0) "
    "-> (Tensor indices, Tensor scale)",
    "gather_rows": "(Tensor grad, Tensor indices, Tensor? scale, *, bool left) -> Tensor",
    "scatter_add_rows_": "(Tensor(a!) param, Tensor low_rank, Tensor indices, Tensor? scale, *, float alpha=1.0, bool left) -> ()",
}


def check_row_norms(grad, *, op="row_norms"):
    expect_matrix(op, "grad", grad)


def check_select_rows(norms, *, r, method, op="select_rows"):
    expect(norms.dim() == 1, op, lambda: f"norms must be a vector (d,), got shape {tuple(norms.shape)}")
    expect_dtype(op, "norms", norms, torch.float32)
    expect(norms.is_contiguous(), op, lambda: f"norms must be contiguous, got strides {tuple(norms.stride())}")
    d = norms.shape[0]
    expect(d <= MOST_ROWS, op, lambda: f"norms must have at most {MOST_ROWS} entries, got {d}")
    expect(r >= 1, op, lambda: f"r must be at least 1, got {r}")
    expect(r <= d, op, lambda: f"r must be at most the {d} rows that norms has, got {r}")
    expect(method in METHODS, op, lambda: f"method must be one of {', '.join(METHODS)}, got {method}")


def expect_indices(op, indices, device, name="indices"):
    expect(indices.dim() == 1, op, lambda: f"{name} must be a vector (r,), got shape {tuple(indices.shape)}")
    expect(indices.shape[0] >= 1, op, lambda: f"rank must be at least 1, got {name} of shape {tuple(indices.shape)}")
    expect_like(op, name, indices, indices.shape, device)
    expect_dtype(op, name, indices, torch.int32)


def expect_row_scale(op, name, scale, indices):
    if scale is not None:
        expect_like(op, name, scale, indices.shape, indices.device)
        expect_dtype(op, name, scale, torch.float32)


def selected_shape(matrix, indices, left):
    """Shape of R = gather_rows(matrix, indices)."""
    return (indices.shape[0], matrix.shape[1]) if left else (matrix.shape[0], indices.shape[0])


def check_gather_rows(grad, indices, scale, *, left, op="gather_rows"):
    expect_matrix(op, "grad", grad)
    expect_indices(op, indices, grad.device)
    expect_row_scale(op, "scale", scale, indices)


def check_scatter_add_rows(param, low_rank, indices, scale, *, left, op="scatter_add_rows_"):
    expect_matrix(op, "param", param)
    expect_indices(op, indices, param.device)
    expect_row_scale(op, "scale", scale, indices)
    expect_like(op, "low_rank", low_rank, selected_shape(param, indices, left), param.device)
    expect_dtype(op, "low_rank", low_rank, torch.float32)


define(SCHEMAS)


@fake("row_norms")
def _(grad, *, left):
    check_row_norms(grad)
    return grad.new_empty(grad.shape[0 if left else 1], dtype=torch.float32)


@fake("select_rows")
def _(norms, *, r, method, seed=0, step=0, parameter=0):
    check_select_rows(norms, r=r, method=method)
    return norms.new_empty((r,), dtype=torch.int32), norms.new_empty((r,))


@fake("gather_rows")
def _(grad, indices, scale, *, left):
    check_gather_rows(grad, indices, scale, left=left)
    return grad.new_empty(selected_shape(grad, indices, left), dtype=torch.float32)


@fake("scatter_add_rows_")
def _(param, low_rank, indices, scale, *, alpha=1.0, left):
    check_scatter_add_rows(param, low_rank, indices, scale, left=left)
