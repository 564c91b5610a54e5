"""A GaLore step with 8-bit moments on the GPU: project, Adam on the codes of R, back-project with the weight update.

A block of 256 elements of a row of R is wider than a tile of the projection, and may span channels whose other elements lie in
other tiles, so that Adam is no epilogue here: R goes through memory once, in fp32, to the CUDA C++ of `adam_8bit_low_rank_`.
"""

import torch

from lowrank_sys import _ops
from lowrank_sys.kernels.back_project import launch_back_project
from lowrank_sys.kernels.basis import Int4Basis
from lowrank_sys.kernels.common import on_device_of
from lowrank_sys.kernels.galore import launches
from lowrank_sys.kernels.project import counters_of, launch_project
from lowrank_sys.kernels.scalars import advance, as_scalar, one_row


def _update(
    params,
    gradients,
    bases,
    *moments_and_steps,
    scalars,
    projected,
    left,
    beta1,
    beta2,
    eps,
    counters=None,
    grad_scale=None,
    found_inf=None,
    skipped=None,
):
    """Matrices of one shape: gradients (G, or R if `projected`) -> R -> Adam's updates X -> W."""
    low_rank_grads = gradients
    if not projected:
        low_rank_grads = [torch.empty(moment.shape, dtype=torch.float32, device=moment.device) for moment in moments_and_steps[0]]
        launch_project(gradients, bases, low_rank_grads, left=left, counters=counters)
    # A 16-bit X keeps the second product on the 16-bit tensor cores.
    updates = [torch.empty_like(r, dtype=basis.dtype) for r, basis in zip(low_rank_grads, bases)]
    torch.ops.lowrank.adam_8bit_low_rank_(
        low_rank_grads,
        updates,
        *moments_and_steps,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        left=left,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )
    launch_back_project(params, updates, bases, scalars, left=left, step=True, skipped=skipped)


def galore_step_8bit(
    param,
    grad,
    basis,
    exp_avg,
    exp_avg_sq,
    exp_avg_absmax,
    exp_avg_sq_absmax,
    *,
    step,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    scale,
    left,
):
    """galore_step with 8-bit moments in blocks of 256 by row of R.

    param (m, n) fp32 | bf16 | fp16 and the moments are updated in place: exp_avg (signed codes) and exp_avg_sq (unsigned codes)
    uint8 of R's shape, their absmax fp32, one a block; basis (m or n, r). step counts from 1; step and lr are numbers or 0-dim
    tensors. Channels of R that are not finite keep their weights and decoded moments.
    """
    moments = (exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax)
    _ops.blockwise.check_galore_step_8bit(param, grad, basis, *moments, left=left)
    _ops.rules.check_step_and_rate("galore_step_8bit", param.device, step, lr)
    with on_device_of(param):
        step = as_scalar(step, param.device)
        scalars, _ = one_row(step, param.device, lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, scale=scale)
        tensors = (param, grad, basis, *moments, step.to(torch.float32))
        _update(
            *([tensor] for tensor in tensors),
            scalars=scalars,
            projected=False,
            left=left,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            counters=counters_of(param.device),
        )


def _step_list(
    op,
    lists,
    *,
    projected,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    scale,
    left,
    group_size=None,
    grad_scale=None,
    found_inf=None,
    skipped=None,
):
    _ops.blockwise.check_low_rank_lists_8bit(
        op, *lists, projected=projected, lr=lr, left=left, group_size=group_size, guards=(grad_scale, found_inf, skipped)
    )
    params, gradients, bases, moments, steps = _ops.blockwise.split_lists(lists, group_size)
    if not params:
        return
    bases = bases[0] if group_size is None else [Int4Basis(*parts, group_size) for parts in zip(*bases)]
    with on_device_of(params[0]):
        order = list(launches(params, gradients, bases))
        rows, _ = advance(
            [steps[i] for launch in order for i in launch],
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            scale=scale,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )
        counters = None if projected else counters_of(params[0].device)
        for launch, scalars in zip(order, rows.split([len(launch) for launch in order])):
            tensors = ([items[i] for i in launch] for items in (params, gradients, bases, *moments, steps))
            _update(
                *tensors,
                scalars=scalars,
                projected=projected,
                left=left,
                beta1=beta1,
                beta2=beta2,
                eps=eps,
                counters=counters,
                grad_scale=grad_scale,
                found_inf=found_inf,
                skipped=skipped,
            )


def galore_step_8bit_list(*lists, **options):
    """galore_step_8bit for many matrices; steps (0-dim fp32) are advanced by one first. Guards as in galore_step_list."""
    _step_list("galore_step_8bit", lists, projected=False, **options)


def galore_step_8bit_int4(*lists, group_size=256, **options):
    """galore_step_8bit_list on bases in INT4: packed codes, scales and offsets, see quantize_int4."""
    _step_list("galore_step_8bit", lists, projected=False, group_size=group_size, **options)


def subspace_step_8bit_list(*lists, **options):
    """galore_step_8bit_list from gradients that are already projected: R (r, n) if left, else (m, r), fp32."""
    _step_list("subspace_step_8bit", lists, projected=True, **options)


def subspace_step_8bit_int4(*lists, group_size=256, **options):
    """galore_step_8bit_int4 from gradients that are already projected: R (r, n) if left, else (m, r), fp32."""
    _step_list("subspace_step_8bit", lists, projected=True, group_size=group_size, **options)
