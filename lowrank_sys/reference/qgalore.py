"""Q-GaLore (Zhang et al. 2024): Adam in the subspace of an INT4 basis, on weights that exist in INT8 only.

Its code dequantizes the weight, takes a step of GaLore's 8-bit Adam, and quantizes the weight again with stochastic rounding.
Here the moments are those of `galore_step_8bit` and the rounding is that of `int8_update_`.
"""

import torch

from lowrank_sys import _ops
from lowrank_sys._ops.numerics import usable
from lowrank_sys.reference.adam import skip
from lowrank_sys.reference.blockwise import Moments
from lowrank_sys.reference.galore import back, project
from lowrank_sys.reference.int4 import dequantize_int4
from lowrank_sys.reference.int8 import int8_update_


def dense_basis(basis, basis_scale, basis_offset, *, d, group_size):
    """The basis (d, r): itself, or the values of its INT4 codes."""
    if basis_scale is None:
        return basis
    return dequantize_int4(basis, basis_scale, basis_offset, d=d, group_size=group_size)


def back_project_int8_(
    codes,
    scale,
    low_rank,
    basis,
    basis_scale=None,
    basis_offset=None,
    *,
    alpha=1.0,
    decay=1.0,
    left,
    seed,
    step,
    parameter,
    offset=0,
    group_size=256,
    basis_group_size=256,
):
    """W <- decay W + alpha back(X) for an INT8 weight, rounded stochastically, in place.

    codes (m, n) int8 and scale (m, ⌈n/group_size⌉) fp32 as in `quantize_int8`; low_rank X (r, n) if left, else (m, r), fp32;
    basis (m or n, r) fp32 | bf16 | fp16, or with basis_scale and basis_offset the packed codes of `quantize_int4` in groups of
    basis_group_size. alpha, decay, the random bits (seed, step, parameter, offset), scales that grow and shrink, and elements
    that are left out are those of `int8_update_` with back(X) as the update: a NaN in X leaves out its channel.
    """
    _ops.qgalore.check_back_project_int8(
        codes,
        scale,
        low_rank,
        basis,
        basis_scale,
        basis_offset,
        alpha=alpha,
        decay=decay,
        left=left,
        step=step,
        parameter=parameter,
        offset=offset,
        group_size=group_size,
        basis_group_size=basis_group_size,
    )
    b = dense_basis(basis, basis_scale, basis_offset, d=codes.shape[0 if left else 1], group_size=basis_group_size)
    int8_update_(
        codes,
        scale,
        back(low_rank, b, left),
        alpha=alpha,
        decay=decay,
        seed=seed,
        step=step,
        parameter=parameter,
        offset=offset,
        group_size=group_size,
    )


def _step(
    codes,
    weight_scale,
    r,
    b,
    moments,
    *,
    step,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    scale,
    left,
    seed,
    parameter,
    offset,
    group_size,
):
    """A step from R; returns how many weights were left out."""
    axis = 0 if left else 1
    ok = usable(r).all(dim=axis, keepdim=True)
    x = Moments(*moments, r.dtype).adam(r, ok, step=step, beta1=beta1, beta2=beta2, eps=eps)
    lr = torch.as_tensor(lr, dtype=torch.float64)
    int8_update_(
        codes,
        weight_scale,
        back(torch.where(ok, x, torch.nan), b, left),
        alpha=-lr * scale,
        decay=1 - lr * weight_decay,
        seed=seed,
        step=int(step) % 2**32,
        parameter=parameter,
        offset=offset,
        group_size=group_size,
    )
    return (~ok).sum() * codes.shape[axis]


def _one(
    op,
    projected,
    codes,
    weight_scale,
    gradient,
    basis,
    basis_scale,
    basis_offset,
    *moments,
    step,
    lr,
    left,
    parameter,
    offset=0,
    group_size=256,
    basis_group_size=256,
    **hyper,
):
    _ops.qgalore.check_qgalore(
        op,
        codes,
        weight_scale,
        gradient,
        basis,
        basis_scale,
        basis_offset,
        *moments,
        projected=projected,
        left=left,
        parameter=parameter,
        offset=offset,
        group_size=group_size,
        basis_group_size=basis_group_size,
    )
    _ops.rules.check_step_and_rate(op, codes.device, step, lr)
    b = dense_basis(basis, basis_scale, basis_offset, d=codes.shape[0 if left else 1], group_size=basis_group_size)
    r = gradient if projected else project(gradient, b, left=left)
    _step(
        codes,
        weight_scale,
        r,
        b,
        moments,
        step=step,
        lr=lr,
        left=left,
        parameter=parameter,
        offset=offset,
        group_size=group_size,
        **hyper,
    )


def _many(
    op,
    projected,
    *lists,
    lr,
    left,
    parameters,
    offsets=(),
    group_size=256,
    basis_group_size=256,
    grad_scale=None,
    found_inf=None,
    skipped=None,
    **hyper,
):
    rows = _ops.qgalore.check_qgalore_list(
        op,
        *lists,
        projected=projected,
        lr=lr,
        left=left,
        parameters=parameters,
        offsets=offsets,
        group_size=group_size,
        basis_group_size=basis_group_size,
        guards=(grad_scale, found_inf, skipped),
    )
    if skip(lists[0], found_inf):
        return
    for (codes, weight_scale, gradient, basis, basis_scale, basis_offset, *moments, parameter, offset), step in zip(
        rows, lists[-1]
    ):
        step += 1
        b = dense_basis(basis, basis_scale, basis_offset, d=codes.shape[0 if left else 1], group_size=basis_group_size)
        r = gradient if projected else project(gradient, b, left=left)
        r = r if grad_scale is None else r * grad_scale.reshape(())
        left_out = _step(
            codes,
            weight_scale,
            r,
            b,
            moments,
            step=step,
            lr=lr,
            left=left,
            parameter=parameter,
            offset=offset,
            group_size=group_size,
            **hyper,
        )
        if skipped is not None:
            skipped += left_out


def qgalore_step(
    codes, weight_scale, grad, basis, basis_scale, basis_offset, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax, **rest
):
    """galore_step_8bit on an INT8 weight: W <- (1 - lr*weight_decay) W - lr*scale*back(Adam(project(G))).

    codes (m, n) int8 and weight_scale (m, ⌈n/group_size⌉) fp32 are the weight, as in `quantize_int8`; grad (m, n) fp32 | bf16 |
    fp16; basis, basis_scale and basis_offset as in `back_project_int8_`, the last two None for a matrix; exp_avg (signed codes) and
    exp_avg_sq (unsigned codes): uint8 of R's shape, exp_avg_absmax and exp_avg_sq_absmax: fp32, one a block of 256. step counts
    from 1 and is the step of the random bits, modulo 2³². A channel of R that is not usable keeps its weights: their codes, or
    where their group gets a new scale their values; moments of skipped channels as in `adam_8bit_low_rank_`.
    """
    _one(
        "qgalore_step",
        False,
        codes,
        weight_scale,
        grad,
        basis,
        basis_scale,
        basis_offset,
        exp_avg,
        exp_avg_sq,
        exp_avg_absmax,
        exp_avg_sq_absmax,
        **rest,
    )


def qgalore_subspace_step(
    codes,
    weight_scale,
    low_rank_grad,
    basis,
    basis_scale,
    basis_offset,
    exp_avg,
    exp_avg_sq,
    exp_avg_absmax,
    exp_avg_sq_absmax,
    **rest,
):
    """qgalore_step from a gradient that is already projected: R (r, n) if left, else (m, r), fp32."""
    _one(
        "qgalore_subspace_step",
        True,
        codes,
        weight_scale,
        low_rank_grad,
        basis,
        basis_scale,
        basis_offset,
        exp_avg,
        exp_avg_sq,
        exp_avg_absmax,
        exp_avg_sq_absmax,
        **rest,
    )


def qgalore_step_list(
    codes,
    weight_scales,
    grads,
    bases,
    basis_scales,
    basis_offsets,
    exp_avgs,
    exp_avg_sqs,
    exp_avg_absmaxes,
    exp_avg_sq_absmaxes,
    steps,
    **rest,
):
    """qgalore_step for many matrices; steps (0-dim fp32) are advanced by one first. Guards as in adamw_step.

    parameters and offsets: for each matrix, where its random bits are; no offsets are 0.
    """
    _many(
        "qgalore_step",
        False,
        codes,
        weight_scales,
        grads,
        bases,
        basis_scales,
        basis_offsets,
        exp_avgs,
        exp_avg_sqs,
        exp_avg_absmaxes,
        exp_avg_sq_absmaxes,
        steps,
        **rest,
    )


def qgalore_subspace_step_list(
    codes,
    weight_scales,
    low_rank_grads,
    bases,
    basis_scales,
    basis_offsets,
    exp_avgs,
    exp_avg_sqs,
    exp_avg_absmaxes,
    exp_avg_sq_absmaxes,
    steps,
    **rest,
):
    """qgalore_subspace_step for many matrices, as qgalore_step_list."""
    _many(
        "qgalore_subspace_step",
        True,
        codes,
        weight_scales,
        low_rank_grads,
        bases,
        basis_scales,
        basis_offsets,
        exp_avgs,
        exp_avg_sqs,
        exp_avg_absmaxes,
        exp_avg_sq_absmaxes,
        steps,
        **rest,
    )
