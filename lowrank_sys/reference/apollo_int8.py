"""APOLLO (Zhu et al. 2024) on weights that exist in INT8 only: its Q-APOLLO, with the rounding of `int8_update_`."""

import torch

from lowrank_sys import _ops
from lowrank_sys.reference.adam import skip
from lowrank_sys.reference.int8 import int8_update_
from lowrank_sys.reference.residual import apollo_update


def _apollo(codes, weight_scale, *tensors, step, lr, weight_decay, left, seed, parameter, offset, group_size, **hyper):
    lr = torch.as_tensor(lr, dtype=torch.float64)
    update, ok, rate = apollo_update(*tensors, step=step, lr=lr, left=left, **hyper)
    int8_update_(
        codes,
        weight_scale,
        torch.where(ok, update, torch.nan),
        alpha=-rate,
        decay=1 - lr * weight_decay,
        seed=seed,
        step=int(step) % 2**32,
        parameter=parameter,
        offset=offset,
        group_size=group_size,
    )
    return (~ok.expand_as(codes)).sum()


def apollo_int8_step(
    codes,
    weight_scale,
    grad,
    basis,
    exp_avg,
    exp_avg_sq,
    limiter=None,
    *,
    step,
    lr,
    left,
    parameter,
    offset=0,
    group_size=256,
    **hyper,
):
    """apollo_step on an INT8 weight: W <- (1 - lr*weight_decay) W - a sqrt(scale) s o G, rounded stochastically.

    codes (m, n) int8 and weight_scale (m, ⌈n/group_size⌉) fp32 are the weight, as in `quantize_int8`; all else as in apollo_step.
    step is also the step of the random bits, modulo 2³²; seed, parameter, offset, and weights of channels that are left out, as in
    `int8_update_`.
    """
    tensors = (codes, weight_scale, grad, basis, exp_avg, exp_avg_sq, limiter)
    _ops.apollo_int8.check_apollo_int8(*tensors, left=left, parameter=parameter, offset=offset, group_size=group_size)
    _ops.rules.check_step_and_rate("apollo_int8_step", codes.device, step, lr)
    _apollo(*tensors, step=step, lr=lr, left=left, parameter=parameter, offset=offset, group_size=group_size, **hyper)


def apollo_int8_step_list(
    codes,
    weight_scales,
    grads,
    bases,
    exp_avgs,
    exp_avg_sqs,
    limiters,
    steps,
    *,
    lr,
    left,
    parameters,
    offsets=(),
    group_size=256,
    grad_scale=None,
    found_inf=None,
    skipped=None,
    **hyper,
):
    """apollo_int8_step for many matrices; no limiters is no limit, no offsets are 0. Steps and guards as in apollo_step_list."""
    rows = _ops.apollo_int8.check_apollo_int8_list(
        codes,
        weight_scales,
        grads,
        bases,
        exp_avgs,
        exp_avg_sqs,
        limiters,
        steps,
        lr=lr,
        left=left,
        parameters=parameters,
        offsets=offsets,
        group_size=group_size,
        guards=(grad_scale, found_inf, skipped),
    )
    if skip(codes, found_inf):
        return
    for (*tensors, parameter, offset), step in zip(rows, steps):
        step += 1
        left_out = _apollo(
            *tensors,
            step=step,
            lr=lr,
            left=left,
            parameter=parameter,
            offset=offset,
            group_size=group_size,
            grad_scale=1.0 if grad_scale is None else grad_scale.reshape(()),
            **hyper,
        )
        if skipped is not None:
            skipped += left_out
