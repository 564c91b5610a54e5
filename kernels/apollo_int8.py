"""APOLLO on INT8 weights on the GPU: the low-rank half of `apollo_step`, then codes are updated and rounded in place."""

import triton
import triton.language as tl

from lowrank_sys import _ops
from lowrank_sys.kernels import configs
from lowrank_sys.kernels.common import ALPHA, CORRECTION1, CORRECTION2, DECAY, is_off, on_device_of
from lowrank_sys.kernels.int8 import aligned, count_left_out, update_int8
from lowrank_sys.kernels.project import counters_of
from lowrank_sys.kernels.residual import apollo_coefficients
from lowrank_sys.kernels.scalars import advance, one_row


@triton.jit(do_not_specialize=["seed", "parameter", "first"], do_not_specialize_on_alignment=["step"])
def scaled_int8_kernel(
    codes,
    weight_scale,
    grad,
    coefficients,
    scalars,
    step,
    skipped,
    seed,
    parameter,
    first,
    m,
    n,
    LEFT: tl.constexpr,
    INT8_GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """W <- decay * W + alpha sqrt(1 - beta2^t) / (1 - beta1^t) * c o G for an INT8 weight, rounded stochastically in place.

    APOLLO (Zhu et al. 2024), with the rules of `update_int8`. c is the channel's coefficient; an element whose update is not finite
    (c is NaN in a skipped channel) is left out and counted. step (int64) is on the device; `first` is the index of element (0, 0)
    in the unsharded tensor.

    Bytes: G once, coefficients once per tile, codes and scales read once and written once.
    """
    if is_off(scalars):
        return
    tiles_n = tl.cdiv(n, BLOCK_N)
    i_m, i_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    o_m = (i_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    m_w = (o_m < m)[:, None] & (o_n < n)[None, :]
    if LEFT:
        b_c = tl.load(coefficients + o_n, mask=o_n < n, other=0.0)[None, :]
    else:
        b_c = tl.load(coefficients + o_m, mask=o_m < m, other=0.0)[:, None]
    b_update = b_c * tl.load(grad + o_m[:, None] * n + o_n[None, :], mask=m_w, other=0.0).to(tl.float32)
    alpha = tl.load(scalars + ALPHA) * (tl.sqrt_rn(tl.load(scalars + CORRECTION2)) / tl.load(scalars + CORRECTION1))
    update_int8(
        b_update,
        codes,
        weight_scale,
        i_m,
        i_n,
        m,
        n,
        alpha,
        tl.load(scalars + DECAY),
        seed,
        tl.load(step),
        parameter,
        first,
        INT8_GROUP,
        ALIGNED,
        BLOCK_M,
        BLOCK_N,
    )
    count_left_out(skipped, b_update, m_w)


def _update(codes, weight_scale, grad, *tensors, parameter, offset, scalars, count, left, seed, group_size, skipped, **hyper):
    if codes.numel() == 0:
        return
    m, n = codes.shape
    coefficients = apollo_coefficients(grad, *tensors, scalars, left=left, **hyper)
    config = configs.scaled_int8(group_size)
    scaled_int8_kernel[configs.cdiv(m, config["BLOCK_M"]) * configs.cdiv(n, config["BLOCK_N"]),](
        codes=codes,
        weight_scale=weight_scale,
        grad=grad,
        coefficients=coefficients,
        scalars=scalars,
        step=count,
        skipped=skipped,
        seed=seed,
        parameter=parameter,
        first=offset,
        m=m,
        n=n,
        LEFT=left,
        INT8_GROUP=group_size,
        ALIGNED=aligned(n, offset),
        **config,
        **configs.OPTIONS,
    )


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
    beta1,
    beta2,
    eps,
    weight_decay,
    scale,
    left,
    seed,
    parameter,
    per_tensor=False,
    scale_front=False,
    growth=1.01,
    offset=0,
    group_size=256,
):
    """apollo_step on an INT8 weight; shapes, types and state as the oracle's apollo_int8_step."""
    tensors = (codes, weight_scale, grad, basis, exp_avg, exp_avg_sq, limiter)
    _ops.apollo_int8.check_apollo_int8(*tensors, left=left, parameter=parameter, offset=offset, group_size=group_size)
    _ops.rules.check_step_and_rate("apollo_int8_step", codes.device, step, lr)
    with on_device_of(codes):
        scalars, counts = one_row(step, codes.device, lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, draws=True)
        _update(
            *tensors,
            parameter=parameter,
            offset=offset,
            scalars=scalars,
            count=counts,
            left=left,
            seed=seed,
            group_size=group_size,
            skipped=None,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            scale=scale,
            per_tensor=per_tensor,
            scale_front=scale_front,
            growth=growth,
            counters=counters_of(codes.device),
        )


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
    beta1,
    beta2,
    eps,
    weight_decay,
    scale,
    left,
    seed,
    parameters,
    per_tensor=False,
    scale_front=False,
    growth=1.01,
    offsets=(),
    group_size=256,
    grad_scale=None,
    found_inf=None,
    skipped=None,
):
    """apollo_int8_step for many matrices; an empty list of limiters is no limit, no offsets are 0."""
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
    if not rows:
        return
    with on_device_of(codes[0]):
        scalars, counts = advance(
            steps,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            grad_scale=grad_scale,
            found_inf=found_inf,
            draws=True,
        )
        counters = counters_of(codes[0].device)
        for (*tensors, parameter, offset), row, count in zip(rows, scalars.split(1), counts.split(1)):
            _update(
                *tensors,
                parameter=parameter,
                offset=offset,
                scalars=row,
                count=count,
                left=left,
                seed=seed,
                group_size=group_size,
                skipped=skipped,
                beta1=beta1,
                beta2=beta2,
                eps=eps,
                scale=scale,
                per_tensor=per_tensor,
                scale_front=scale_front,
                growth=growth,
                counters=counters,
            )
