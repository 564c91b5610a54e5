"""Grass (Muhamed et al. 2024): Adam on selected rows of the gradient. P = rho B with B rows of the identity, so that
R = P G gathers and Pᵀ X scatters: no product is dense."""

import torch

from lowrank_sys import _ops
from lowrank_sys._ops.numerics import accumulator, usable
from lowrank_sys.reference.adam import adam_, is_truth, skip
from lowrank_sys.reference.galore import channel_norms
from lowrank_sys.reference.rounding import draw_of, write_


def row_norms(grad, *, left, norms=channel_norms):
    """2-norm of every row that can be selected: (m,), of the rows of G (m, n), if left, else (n,), of its columns; fp32.

    The channel norms of the other side, by the same kernels.
    """
    _ops.sparse.check_row_norms(grad)
    return norms(grad, left=not left)


def check_indices(op, indices, size, name="indices", distinct=True):
    """On the CPU, every index is in [0, size) and, if distinct, appears once: a RuntimeError names the first that is not.

    Elsewhere reading them would wait for the device; there a bad index is left out.
    """
    first = {}
    for j, index in enumerate(indices.tolist() if indices.device.type == "cpu" else ()):
        _ops.rules.expect(0 <= index < size, op, lambda: f"{name}[{j}] must be in [0, {size}), got {index}")
        _ops.rules.expect(not distinct or index not in first, op, lambda: f"{name}[{j}] = {index} repeats {name}[{first[index]}]")
        first[index] = j


def in_range(indices, size):
    return (indices >= 0) & (indices < size)


def counted(indices, size):
    """Indices that are in range and equal no earlier one."""
    repeats = (indices[:, None] == indices).tril(-1).any(dim=1)
    return in_range(indices, size) & ~repeats


def per_row(values, left):
    """A vector (r,) shaped to scale the rows of R (r, n) if left, else the columns of R (m, r)."""
    return values[:, None] if left else values[None]


def gather_rows(grad, indices, scale, *, left):
    """R = scale_j G[indices_j, :] (r, n) if left, else scale_j G[:, indices_j] (m, r); fp32.

    grad (m, n) fp32 | bf16 | fp16; indices (r,) int32, repetition allowed; scale (r,) fp32 or None for 1. An index out of
    range is an error on the CPU, and gathers zeros on a GPU.
    """
    axis = 0 if left else 1
    if grad.dtype != torch.float64:
        _ops.sparse.check_gather_rows(grad, indices, scale, left=left)
        check_indices("gather_rows", indices, grad.shape[axis], distinct=False)
    rows = grad.to(accumulator(grad)).index_select(axis, indices.long().clamp(0, grad.shape[axis] - 1))
    if scale is not None:
        rows = rows * per_row(scale.to(rows.dtype), left)
    return torch.where(per_row(in_range(indices, grad.shape[axis]), left), rows, 0)


def scatter_add_rows_(param, low_rank, indices, scale, *, alpha=1.0, left):
    """W[indices_j, :] += alpha scale_j L[j, :] if left, else W[:, indices_j] += alpha scale_j L[:, j]; in place.

    param (m, n) fp32 | bf16 | fp16; low_rank L of R's shape, fp32; indices (r,) int32; scale (r,) fp32 or None for 1. An index
    that is out of range or repeated is an error on the CPU, before anything is written; on a GPU it is left out (of equal
    ones the first counts).
    """
    axis = 0 if left else 1
    if param.dtype != torch.float64:
        _ops.sparse.check_scatter_add_rows(param, low_rank, indices, scale, left=left)
        check_indices("scatter_add_rows_", indices, param.shape[axis])
    scale = low_rank.new_ones(len(indices)) if scale is None else scale.to(low_rank.dtype)
    _add_rows_(param, per_row(alpha * scale, left) * low_rank, indices, counted(indices, param.shape[axis]), axis)


def _add_rows_(param, rows, indices, count, axis):
    left = axis == 0
    at = indices.long().clamp(0, max(param.shape[axis] - 1, 0))
    param.copy_(param.to(rows.dtype).index_add(axis, at, torch.where(per_row(count, left), rows, 0)))


def _step(
    param, grad, indices, row_scale, exp_avg, exp_avg_sq, *, step, lr, beta1, beta2, eps, weight_decay, scale, left, draw,
    grad_scale=None,
):  # fmt: skip
    """The step of one matrix; returns how many weights were left out."""
    axis = 0 if left else 1
    count = counted(indices, param.shape[axis])
    w, g = param.to(accumulator(param)), grad.to(accumulator(param))
    r = gather_rows(g.double() if param.dtype == torch.float64 else g, indices, row_scale, left=left)
    if grad_scale is not None:
        r = r * grad_scale
    ok = (usable(r) | ~per_row(count, left)).all(dim=axis, keepdim=True)
    x = adam_(r, exp_avg, exp_avg_sq, ok & per_row(count, left), step=step, beta1=beta1, beta2=beta2, eps=eps)
    new = (1 - lr * weight_decay) * w
    if row_scale is not None:
        x = x * per_row(row_scale.to(x.dtype), left)
    _add_rows_(new, -(lr * scale) * x, indices, count, axis)
    write_(param, torch.where(ok, new, w), step=step, **draw)
    return (~ok).sum() * param.shape[axis]


def rows_step(
    weights, gradients, indices, row_scales, exp_avgs, exp_avg_sqs, steps, *, lr, left, advance=True, stochastic=False, seed=0,
    parameters=(), offsets=(), grad_scale=None, found_inf=None, skipped=None, op="step", checked=True, **hyper,
):  # fmt: skip
    """One Grass-AdamW step of every matrix: W <- (1 - lr*weight_decay) W - lr*scale*scatter(Adam(gather(G))).

    weights (m, n) fp32 | bf16 | fp16 and the moments (fp32, R's shape) are updated in place; gradients (m, n); indices (r,) int32
    and row_scales (r,) fp32, or none at all, as in gather_rows and scatter_add_rows_, with their rule for bad indices. All of W
    decays, as torch.optim.AdamW's; without weight decay only the selected rows are read or written. A channel of R (a column of G
    if left) with a value that is not finite keeps its moments and weights; a value that is not finite in a row that is not selected
    has no effect. steps, advance, the rounding, the guards and op as in `step`.
    """
    if is_truth(weights, checked):
        rows = list(zip(weights, gradients, indices, row_scales or [None] * len(weights), exp_avgs, exp_avg_sqs, steps))
    else:
        rows = _ops.step.check_rows(
            weights, gradients, indices, row_scales, exp_avgs, exp_avg_sqs, steps, lr=lr, left=left, advance=advance,
            stochastic=stochastic, parameters=parameters, offsets=offsets, grad_scale=grad_scale, found_inf=found_inf,
            skipped=skipped, op=op,
        )  # fmt: skip
        for i, (param, _, index, *_) in enumerate(rows):
            check_indices(op if len(rows) == 1 else f"{op}: matrix {i}", index, param.shape[0 if left else 1])
    if skip(weights, found_inf):
        return
    for i, (*tensors, step) in enumerate(rows):
        if advance:
            step.add_(1)
        draw = draw_of(i, stochastic, seed, parameters, offsets)
        left_out = _step(*tensors, step=step, lr=lr, left=left, draw=draw, grad_scale=grad_scale, **hyper)
        if skipped is not None:
            skipped += left_out
