"""Adafactor (Shazeer and Stern 2018), on the full gradient or in a subspace as GaLore's GaLoreAdafactor."""

import math

import torch

from lowrank_sys import _ops
from lowrank_sys.reference.adam import accumulator, usable
from lowrank_sys.reference.galore import back_project_ as dense_back_project_
from lowrank_sys.reference.galore import project as dense_project


def rms(x):
    return torch.linalg.vector_norm(x) / math.sqrt(max(x.numel(), 1))


def _mean_over(x, ok, dim):
    """Mean along `dim` of the entries where ok (broadcast along the other axis). Divides first: the sum may overflow."""
    ok = ok.expand_as(x)
    return (torch.where(ok, x, 0) / ok.sum(dim, keepdim=True).clamp(min=1)).sum(dim, keepdim=True)


def _inverse_root(statistic):
    """0 where there is no statistic yet: what was left out from the first step on has none."""
    return torch.where(statistic > 0, statistic.rsqrt(), 0)


def _preconditioned(r, square, ok, row, col, beta2):
    """Advance the factored statistics (m, 1), (1, n) where ok; return r over the root of the estimate row col / mean(row).

    Factor by factor: the estimate itself leaves fp32 where some rows are zero and others large.
    """
    for statistic, dim in ((row, -1), (col, -2)):
        seen = ok.expand_as(square).any(dim, keepdim=True)
        statistic.copy_(torch.where(seen, beta2 * statistic + (1 - beta2) * _mean_over(square, ok, dim), statistic))
    mean = (row / max(row.shape[-2], 1)).sum(dim=-2, keepdim=True)
    return (r * _inverse_root(row)) * (mean.sqrt() * _inverse_root(col))


def adafactor_step(
    param,
    grad,
    basis,
    exp_avg,
    row,
    col,
    exp_avg_sq,
    step,
    *,
    lr,
    beta1,
    decay_rate,
    eps1,
    eps2,
    clip_threshold,
    weight_decay,
    scale,
    scale_parameter,
    relative_step,
    warmup_init,
    left,
    skipped=None,
    project=dense_project,
    back_project_=dense_back_project_,
):
    """One Adafactor step; with a basis: on R, clipped and scaled by the rate in the subspace, then W <- W - scale*back(U).

    Args:
        param, grad: (m, n) or, without a basis, of any shape; fp32 | bf16 | fp16; param is updated in place.
        basis: (m or n, r) or None.
        exp_avg: fp32 first moment of R's shape, or None (beta1 is None in Adafactor's terms).
        row, col: fp32 factored statistics (rows, 1) and (1, columns) of R, for matrices; else None.
        exp_avg_sq: fp32 statistics of the gradient's shape where it is no matrix; else None.
        step: 0-dim fp32 counter, advanced by one.
        lr: 0-dim rate, unused with relative_step.
        skipped: int64 counter of the elements left out because their gradient is not finite.
    """
    _ops.steps.check_adafactor_step(param, grad, basis, exp_avg, row, col, exp_avg_sq, step, lr, left=left, skipped=skipped)
    step += 1
    dtype = accumulator(param)
    r = grad.to(dtype) if basis is None else project(grad, basis, left=left)
    ok = usable(r) if basis is None else usable(r).all(dim=0 if left else 1, keepdim=True)
    square = torch.where(ok, r, 0).square() + eps1
    beta2 = 1 - step**decay_rate
    if row is not None:
        update = _preconditioned(torch.where(ok, r, 0), square, ok, row, col, beta2)
    else:
        exp_avg_sq.copy_(torch.where(ok, beta2 * exp_avg_sq + (1 - beta2) * square, exp_avg_sq))
        update = torch.where(ok, r, 0) * _inverse_root(exp_avg_sq)
    rate = lr
    if relative_step:
        rate = torch.minimum(1e-6 * step if warmup_init else torch.full_like(step, 1e-2), step.rsqrt())
    if scale_parameter:
        rate = rate * rms(param.to(dtype)).clamp(min=eps2)
    update = update * (rate / (rms(update) / clip_threshold).clamp(min=1))
    if exp_avg is not None:
        exp_avg.copy_(torch.where(ok, beta1 * exp_avg + (1 - beta1) * update, exp_avg))
        update = torch.where(ok, exp_avg, 0)
    if weight_decay != 0:
        param.mul_(torch.where(ok, 1 - rate * weight_decay, 1.0))
    if basis is None:
        param.copy_(param.to(dtype) - update)
    else:
        back_project_(param, update, basis, alpha=-scale, left=left)
    if skipped is not None:
        skipped += (~ok).sum() * (1 if basis is None else param.shape[0 if left else 1])
