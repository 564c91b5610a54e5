"""Structured sparse projections (Grass): the basis is r rows, or columns, of the identity, each with a scale.

The selected rows are those of G's projected axis: rows of G if left, columns if right. `indices` (r,) int32 names them and
`scale` (r,) fp32 is the diagonal rho of the projection, None for ones.
"""

import torch

from lowrank_sys._ops.rules import (
    ADAM,
    GUARDS,
    check_guards,
    check_lists,
    check_step_and_rate,
    define,
    expect,
    expect_dtype,
    expect_float,
    expect_like,
    expect_matrix,
    fake,
)

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
    # W <- (1 - lr*weight_decay) W - lr*scale*scatter(Adam(gather(G))); row_scale is the scale of gather and scatter.
    "grass_step.tensor": "(Tensor(a!) param, Tensor grad, Tensor indices, Tensor? row_scale, Tensor(b!) exp_avg, "
    f"Tensor(c!) exp_avg_sq, *, Tensor step, Tensor lr, {ADAM}, float scale, bool left) -> ()",
    "grass_step": "(Tensor(a!) param, Tensor grad, Tensor indices, Tensor? row_scale, Tensor(b!) exp_avg, "
    f"Tensor(c!) exp_avg_sq, *, SymInt step, float lr, {ADAM}, float scale, bool left) -> ()",
    # row_scales is empty where no matrix has one.
    "grass_step.list": "(Tensor(a!)[] params, Tensor[] grads, Tensor[] indices, Tensor[] row_scales, Tensor(b!)[] exp_avgs, "
    f"Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, *, Tensor lr, {ADAM}, float scale, bool left, {GUARDS}) -> ()",
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


def check_grass_step(param, grad, indices, row_scale, exp_avg, exp_avg_sq, *, left, op="grass_step"):
    expect_matrix(op, "param", param)
    expect_float(op, "grad", grad)
    expect_like(op, "grad", grad, param.shape, param.device)
    expect_indices(op, indices, param.device)
    expect_row_scale(op, "row_scale", row_scale, indices)
    for name, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        expect_like(op, name, moment, selected_shape(param, indices, left), param.device)
        expect_dtype(op, name, moment, torch.float32)


def check_grass_list(params, grads, indices, row_scales, exp_avgs, exp_avg_sqs, steps, lr, left, guards, op="grass_step"):
    lists = dict(params=params, grads=grads, indices=indices, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, steps=steps)
    check_lists(op, **lists, **(dict(row_scales=row_scales) if row_scales else {}))
    check_guards(op, params, steps, lr, *guards)
    for i, (param, grad, index, *moments) in enumerate(zip(params, grads, indices, exp_avgs, exp_avg_sqs)):
        check_grass_step(param, grad, index, row_scales[i] if row_scales else None, *moments, left=left, op=op)


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


def _grass_fake(param, grad, indices, row_scale, exp_avg, exp_avg_sq, *, step, lr, beta1, beta2, eps, weight_decay, scale, left):
    check_grass_step(param, grad, indices, row_scale, exp_avg, exp_avg_sq, left=left)
    check_step_and_rate("grass_step", param.device, step, lr)


fake("grass_step.tensor")(_grass_fake)
fake("grass_step")(_grass_fake)


@fake("grass_step.list")
def _(
    params,
    grads,
    indices,
    row_scales,
    exp_avgs,
    exp_avg_sqs,
    steps,
    *,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    scale,
    left,
    grad_scale=None,
    found_inf=None,
    skipped=None,
):
    check_grass_list(params, grads, indices, row_scales, exp_avgs, exp_avg_sqs, steps, lr, left, (grad_scale, found_inf, skipped))
