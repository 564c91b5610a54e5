"""Steps that use the part of the gradient that a basis does not hold, on the GPU: APOLLO, Fira, FRUGAL.

project -> moments and channel norms of R -> one program for the limiter -> the weights, with a back-projection where the method
has one. G is read twice, W is read and written once, and nothing else of their size exists.
"""

import torch
import triton
import triton.language as tl

from lowrank_sys import _ops
from lowrank_sys.kernels import configs
from lowrank_sys.kernels.adam import launch_adam
from lowrank_sys.kernels.common import (
    ALPHA,
    CORRECTION1,
    CORRECTION2,
    DECAY,
    GRAD_SCALE,
    dot,
    is_off,
    on_device_of,
    precision,
    store,
)
from lowrank_sys.kernels.gaussian import launch_gaussian_project
from lowrank_sys.kernels.project import counters_of, launch_project
from lowrank_sys.kernels.scalars import advance, one_row
from lowrank_sys.reference.residual import TINY as tiny

TINY = tl.constexpr(tiny)
# Rows of the sums of a channel: of N², of R², and of the squares of its residual.
N_SQUARES, R_SQUARES, RESIDUAL = (tl.constexpr(i) for i in range(3))
SCALED, COMBINED, SIGNED = (tl.constexpr(i) for i in range(3))


@triton.jit
def ratio_kernel(
    low_rank_grad,
    gram_grad,
    out,
    exp_avg,
    exp_avg_sq,
    squares,
    sums,
    scalars,
    channels,
    r,
    splits,
    alpha,
    beta1,
    beta2,
    gain1,
    gain2,
    eps,
    LEFT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Moments of grad_scale * R advance; sums (3, channels) <- |N|², |R|², |G - alpha back(R)|² by channel; out = N if given.

    N = M / (sqrt(V) + eps), as in APOLLO's and Fira's code. squares (splits, channels) are parts of |G|²; gram_grad is (BᵀB)R,
    None for an orthonormal basis. A channel whose squares are not finite keeps its moments: |N|² and N are NaN there. A program
    owns whole channels: it tests them, then steps.

    Bytes per element of R: R twice (the second time from the cache), moments twice each, gram_grad and out once.
    """
    if is_off(scalars):
        return
    o_c = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    o_r = tl.arange(0, BLOCK_R).to(tl.int64)
    m_c = o_c < channels
    stride = tl.full([], BLOCK_R, tl.int64)
    if LEFT:
        o_first, step = o_r[:, None] * channels + o_c[None, :], stride * channels
    else:
        o_first, step = o_c[:, None] * r + o_r[None, :], stride
    grad_scale = tl.load(scalars + GRAD_SCALE)

    o_tile = o_first
    b_zero = tl.zeros([BLOCK_R, BLOCK_C] if LEFT else [BLOCK_C, BLOCK_R], tl.float32)
    b_sum = b_zero
    for i_r in range(0, r, BLOCK_R):
        m_r = i_r + tl.arange(0, BLOCK_R) < r
        m_tile = (m_r[:, None] & m_c[None, :]) if LEFT else (m_c[:, None] & m_r[None, :])
        b_g = tl.load(low_rank_grad + o_tile, mask=m_tile, other=0.0) * grad_scale
        b_sum += b_g * b_g
        o_tile += step
    b_r_squares = tl.sum(b_sum, axis=0 if LEFT else 1)
    b_ok = b_r_squares < float("inf")
    b_residual = tl.zeros([BLOCK_C], tl.float32)
    if squares is not None:
        p_squares = squares + o_c
        for _ in range(splits):
            b_residual += tl.load(p_squares, mask=m_c, other=0.0)
            p_squares += channels
        b_ok = b_ok & (b_residual < float("inf"))
    b_wide = b_ok[None, :] if LEFT else b_ok[:, None]

    o_tile = o_first
    b_sum, b_inside = b_zero, b_zero
    for i_r in range(0, r, BLOCK_R):
        m_r = i_r + tl.arange(0, BLOCK_R) < r
        m_tile = (m_r[:, None] & m_c[None, :]) if LEFT else (m_c[:, None] & m_r[None, :])
        b_g = tl.load(low_rank_grad + o_tile, mask=m_tile, other=0.0) * grad_scale
        b_m = tl.load(exp_avg + o_tile, mask=m_tile, other=0.0)
        b_v = tl.load(exp_avg_sq + o_tile, mask=m_tile, other=0.0)
        b_m = tl.where(b_wide, beta1 * b_m + gain1 * b_g, b_m)
        b_v = tl.where(b_wide, beta2 * b_v + gain2 * b_g * b_g, b_v)
        tl.store(exp_avg + o_tile, b_m, mask=m_tile)
        tl.store(exp_avg_sq + o_tile, b_v, mask=m_tile)
        # A plain square root would flush a small v to zero, and a tiny eps would not save it.
        b_n = tl.where(b_wide & m_tile, b_m / (tl.sqrt_rn(b_v) + eps), 0.0)
        b_sum += b_n * b_n
        if gram_grad is not None:
            b_inside += b_g * (tl.load(gram_grad + o_tile, mask=m_tile, other=0.0) * grad_scale)
        if out is not None:
            tl.store(out + o_tile, tl.where(b_wide, b_n, float("nan")), mask=m_tile)
        o_tile += step
    tl.store(sums + o_c + N_SQUARES * channels, tl.where(b_ok, tl.sum(b_sum, axis=0 if LEFT else 1), float("nan")), mask=m_c)
    tl.store(sums + o_c + R_SQUARES * channels, b_r_squares, mask=m_c)
    if squares is not None:
        b_in_basis = b_r_squares
        if gram_grad is not None:
            b_in_basis = tl.sum(b_inside, axis=0 if LEFT else 1)
        b_residual = b_residual * grad_scale * grad_scale - 2 * alpha * b_r_squares + alpha * alpha * b_in_basis
        tl.store(sums + o_c + RESIDUAL * channels, tl.where(b_ok, tl.maximum(b_residual, 0.0), 0.0), mask=m_c)


@triton.jit
def total(p_parts, parts, BLOCK: tl.constexpr):
    b_sum = tl.zeros([BLOCK], tl.float64)
    for i in range(0, parts, BLOCK):
        o = i + tl.arange(0, BLOCK)
        b_sum += tl.load(p_parts + o, mask=o < parts, other=0.0, cache_modifier=".cg")
    return tl.sum(b_sum)


@triton.jit
def coefficient_kernel(
    sums,
    limiter,
    coefficients,
    norms,
    counters,
    scalars,
    channels,
    growth,
    front,
    behind,
    PER_TENSOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """coefficients <- grad_scale * front * behind * |N| / (|R| + 1e-8) over the limiter's divisor; NaN where not usable.

    The norm of front * ratio * residual may grow by `growth` a step; `limiter` holds the last one, 0 before the first (Fira, Chen
    et al. 2024). A program owns a block of channels. For one ratio for the matrix and for the limiter, norms (3, programs)
    get the blocks' sums: of N², of R², and of the squared residuals, scaled unless there is one ratio. They are fp64, because
    squares leave the range of fp32. The last program adds them in order, so that the result does not depend on timing, and
    multiplies all coefficients by what they share, unless that is 1.

    Bytes: sums once (residuals with a limiter alone), coefficients once, or three times where they are multiplied.
    """
    if is_off(scalars):
        return
    i, programs = tl.program_id(0), tl.num_programs(0)
    o_c = (i * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    m_c = o_c < channels
    b_n = tl.load(sums + N_SQUARES * channels + o_c, mask=m_c, other=0.0)
    b_r = tl.load(sums + R_SQUARES * channels + o_c, mask=m_c, other=0.0)
    b_ok = b_n == b_n
    b_s = tl.full([BLOCK], 1.0, tl.float32)
    if not PER_TENSOR:
        b_s = tl.sqrt_rn(b_n) / (tl.sqrt_rn(b_r) + TINY)
    b_c = b_s * front * behind * tl.load(scalars + GRAD_SCALE)
    tl.store(coefficients + o_c, tl.where(b_ok, b_c, float("nan")), mask=m_c)
    if norms is not None:
        if PER_TENSOR:
            tl.store(norms + i, tl.sum(tl.where(b_ok, b_n, 0.0).to(tl.float64)))
            tl.store(norms + programs + i, tl.sum(tl.where(b_ok, b_r, 0.0).to(tl.float64)))
        if limiter is not None:
            b_residual = tl.load(sums + RESIDUAL * channels + o_c, mask=m_c, other=0.0)
            b_norm = tl.where(b_ok, b_s * tl.sqrt_rn(b_residual), 0.0).to(tl.float64)
            tl.store(norms + 2 * programs + i, tl.sum(b_norm * b_norm))
        # All threads' stores come before the count that publishes them.
        tl.debug_barrier()
        if tl.atomic_add(counters, 1, sem="acq_rel") == programs - 1:
            tl.store(counters, 0)
            shared = tl.full([], 1.0, tl.float64)
            if PER_TENSOR:
                shared = tl.sqrt(total(norms, programs, BLOCK)) / (tl.sqrt(total(norms + programs, programs, BLOCK)) + TINY)
            if limiter is not None:
                norm = front * shared * tl.sqrt(total(norms + 2 * programs, programs, BLOCK))
                before = tl.load(limiter).to(tl.float64)
                divisor = tl.full([], 1.0, tl.float64)
                if (before > 0) & (norm > 0):
                    divisor = tl.maximum(norm / (before + TINY), growth) / growth
                if norm > 0:
                    tl.store(limiter, (norm / divisor).to(tl.float32))
                shared = shared / divisor
            if shared != 1:
                factor = shared.to(tl.float32)
                for first in range(0, channels, 8 * BLOCK):
                    o_all = first + tl.arange(0, 8 * BLOCK)
                    b_all = tl.load(coefficients + o_all, mask=o_all < channels, other=0.0, cache_modifier=".cg")
                    tl.store(coefficients + o_all, b_all * factor, mask=o_all < channels)


@triton.jit
def residual_kernel(
    param,
    grad,
    low_rank,
    low_rank_grad,
    basis,
    coefficients,
    scalars,
    skipped,
    m,
    n,
    r,
    scale,
    residual_scale,
    LEFT: tl.constexpr,
    RULE: tl.constexpr,
    CORRECTED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """W <- decay * W + alpha * update, in place; c is the channel's coefficient, or residual_scale * grad_scale without any.

    SCALED (APOLLO): c G. COMBINED (Fira; FRUGAL with plain SGD): back(scale X - k c R) + c G with k = scale for Fira, else 1: one
    product for back(X) and for the projection of G that leaves the residual. SIGNED (FRUGAL): scale back(X) + residual_scale *
    sign(grad_scale (G - back(R))): two products that share the tile of the basis; R stays fp32. alpha is multiplied by
    sqrt(1 - beta2^t) / (1 - beta1^t) if CORRECTED. An element whose update is not finite keeps its bytes (X or c is NaN in a
    skipped channel) and is counted.

    Bytes: G once, W read once and written once; X and R once per tile of rows if LEFT (else of columns), B once per tile of the
    other axis.
    """
    if is_off(scalars):
        return
    tiles_n = tl.cdiv(n, BLOCK_N)
    i_m, i_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    o_m = (i_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    m_m, m_n = o_m < m, o_n < n
    grad_scale = tl.load(scalars + GRAD_SCALE)
    if coefficients is not None:
        if LEFT:
            b_c = tl.load(coefficients + o_n, mask=m_n, other=0.0)[None, :]
        else:
            b_c = tl.load(coefficients + o_m, mask=m_m, other=0.0)[:, None]
        inside = scale
    else:
        b_c = tl.full([1, 1], 1.0, tl.float32) * (residual_scale * grad_scale)
        inside = 1.0

    b_back = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_inside = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if RULE != SCALED:
        o_r = tl.arange(0, BLOCK_R).to(tl.int64)
        stride = tl.full([], BLOCK_R, tl.int64)
        if LEFT:
            p_basis, step_basis = basis + o_m[:, None] * r + o_r[None, :], stride
            o_x, step_x = o_r[:, None] * n + o_n[None, :], stride * n
        else:
            p_basis, step_basis = basis + o_n[None, :] * r + o_r[:, None], stride
            o_x, step_x = o_m[:, None] * r + o_r[None, :], stride
        for i_r in range(0, r, BLOCK_R):
            m_r = i_r + tl.arange(0, BLOCK_R) < r
            if LEFT:
                m_basis, m_x = m_m[:, None] & m_r[None, :], m_r[:, None] & m_n[None, :]
            else:
                m_basis, m_x = m_r[:, None] & m_n[None, :], m_m[:, None] & m_r[None, :]
            b_basis = tl.load(p_basis, mask=m_basis, other=0.0)
            b_x = tl.load(low_rank + o_x, mask=m_x, other=0.0)
            b_r = tl.load(low_rank_grad + o_x, mask=m_x, other=0.0)
            if RULE == COMBINED:
                b_x = scale * b_x - inside * b_c * b_r
            # A 16-bit operand keeps the product on the 16-bit tensor cores.
            b_x = b_x.to(b_basis.dtype)
            if LEFT:
                b_back = dot(b_basis, b_x, b_back, PRECISION)
            else:
                b_back = dot(b_x, b_basis, b_back, PRECISION)
            if RULE == SIGNED:
                if LEFT:
                    b_inside = dot(b_basis, b_r, b_inside, PRECISION)
                else:
                    b_inside = dot(b_r, b_basis, b_inside, PRECISION)
            p_basis += step_basis
            o_x += step_x

    o_w = o_m[:, None] * n + o_n[None, :]
    m_w = m_m[:, None] & m_n[None, :]
    b_g = tl.load(grad + o_w, mask=m_w, other=0.0).to(tl.float32)
    if RULE == SIGNED:
        b_left = (b_g - b_inside) * grad_scale
        b_update = scale * b_back + residual_scale * ((b_left > 0).to(tl.float32) - (b_left < 0).to(tl.float32))
    else:
        b_update = b_back + b_c * b_g
    alpha = tl.load(scalars + ALPHA)
    if CORRECTED:
        alpha = alpha * (tl.sqrt_rn(tl.load(scalars + CORRECTION2)) / tl.load(scalars + CORRECTION1))
    b_w = tl.load(param + o_w, mask=m_w, other=0.0).to(tl.float32)
    b_ok = tl.abs(b_update) < float("inf")
    b_new = tl.where(b_ok, tl.load(scalars + DECAY) * b_w + alpha * b_update, b_w)
    if skipped is not None:
        count = tl.sum((m_w & ~b_ok).to(tl.int32))
        if count > 0:
            tl.atomic_add(skipped, count.to(tl.int64), sem="relaxed")
    store(param + o_w, b_new, m_w)


def launch_ratio(low_rank_grad, out, exp_avg, exp_avg_sq, scalars, *, left, squares, gram_grad, alpha, beta1, beta2, eps):
    """The sums (3, channels) of `ratio_kernel`."""
    rows, cols = exp_avg.shape
    channels, r = (cols, rows) if left else (rows, cols)
    sums = torch.empty((3, channels), dtype=torch.float32, device=exp_avg.device)
    ratio_kernel[configs.cdiv(channels, configs.ADAM["BLOCK_C"]),](
        low_rank_grad=low_rank_grad,
        gram_grad=gram_grad,
        out=out,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        squares=squares,
        sums=sums,
        scalars=scalars,
        channels=channels,
        r=r,
        splits=0 if squares is None else squares.shape[0],
        alpha=alpha,
        beta1=beta1,
        beta2=beta2,
        gain1=1 - beta1,
        gain2=1 - beta2,
        eps=eps,
        LEFT=left,
        **configs.ADAM,
        **configs.OPTIONS,
    )
    return sums


def launch_coefficients(sums, limiter, scalars, *, growth, front, behind, per_tensor, counters):
    """The coefficients (channels,) of `coefficient_kernel`."""
    channels = sums.shape[1]
    coefficients = torch.empty(channels, dtype=torch.float32, device=sums.device)
    programs = configs.cdiv(channels, configs.COEFFICIENT["BLOCK"])
    apart = limiter is None and not per_tensor
    coefficient_kernel[programs,](
        sums=sums,
        limiter=limiter,
        coefficients=coefficients,
        norms=None if apart else torch.empty((3, programs), dtype=torch.float64, device=sums.device),
        counters=None if apart else counters,
        scalars=scalars,
        channels=channels,
        growth=growth,
        front=front,
        behind=behind,
        PER_TENSOR=per_tensor,
        **configs.COEFFICIENT,
        **configs.OPTIONS,
    )
    return coefficients


def launch_residual(
    param,
    grad,
    scalars,
    *,
    rule,
    left,
    low_rank=None,
    low_rank_grad=None,
    basis=None,
    coefficients=None,
    scale=1.0,
    residual_scale=1.0,
    corrected=False,
    skipped=None,
):
    """W <- scalars[DECAY] W + scalars[ALPHA] * the update of `residual_kernel`."""
    m, n = param.shape
    r = 0 if basis is None else basis.shape[1]
    config = configs.residual_config(rule.value, r)
    residual_kernel[configs.cdiv(m, config["BLOCK_M"]) * configs.cdiv(n, config["BLOCK_N"]),](
        param=param,
        grad=grad,
        low_rank=low_rank,
        low_rank_grad=low_rank_grad,
        basis=basis,
        coefficients=coefficients,
        scalars=scalars,
        skipped=skipped,
        m=m,
        n=n,
        r=r,
        scale=scale,
        residual_scale=residual_scale,
        LEFT=left,
        RULE=rule,
        CORRECTED=corrected,
        PRECISION=precision(),
        **config,
        **configs.OPTIONS,
    )


def _squares(grad, left):
    """Makes the buffer of `launch_project` for the sums of squares of G's channels."""
    return lambda splits: torch.empty((splits, grad.shape[1 if left else 0]), dtype=torch.float32, device=grad.device)


def apollo_coefficients(
    grad, basis, exp_avg, exp_avg_sq, limiter, scalars, *, left, beta1, beta2, eps, scale, per_tensor, scale_front, growth, counters
):
    """Advances the moments and the limiter; returns what the channels of G are multiplied by, NaN where left out."""
    r = torch.empty_like(exp_avg)
    squares = None if limiter is None else _squares(grad, left)
    if _ops.residual.is_key(basis):
        squares = launch_gaussian_project(grad, r, left=left, counters=counters, key=basis, squares=squares, scalars=scalars)
    else:
        squares = launch_project([grad], [basis], [r], left=left, counters=counters, squares=squares, scalars=scalars)
    sums = launch_ratio(
        r,
        None,
        exp_avg,
        exp_avg_sq,
        scalars,
        left=left,
        squares=squares,
        gram_grad=None,
        alpha=0.0,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
    )
    front = scale**0.5
    return launch_coefficients(
        sums,
        limiter,
        scalars,
        growth=growth,
        front=front if scale_front else 1.0,
        behind=1.0 if scale_front else front,
        per_tensor=per_tensor,
        counters=counters,
    )


def _apollo(param, grad, *tensors, left, skipped, **rest):
    *_, scalars = tensors
    coefficients = apollo_coefficients(grad, *tensors, left=left, **rest)
    launch_residual(param, grad, scalars, rule=SCALED, left=left, coefficients=coefficients, corrected=True, skipped=skipped)


def _fira(
    param, grad, basis, exp_avg, exp_avg_sq, limiter, gram, scalars, *, left, beta1, beta2, eps, alpha, growth, counters, skipped
):
    r, out = torch.empty_like(exp_avg), torch.empty_like(exp_avg)
    squares = launch_project(
        [grad],
        [basis],
        [r],
        left=left,
        counters=counters,
        scalars=scalars,
        squares=None if limiter is None else _squares(grad, left),
    )
    gram_grad = None
    if gram is not None and limiter is not None:
        # The Gram matrix is symmetric: BᵀB R is a projection of R.
        gram_grad = torch.empty_like(r)
        launch_project([r], [gram], [gram_grad], left=left, counters=counters, scalars=scalars)
    sums = launch_ratio(
        r,
        out,
        exp_avg,
        exp_avg_sq,
        scalars,
        left=left,
        squares=squares,
        gram_grad=gram_grad,
        alpha=alpha,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
    )
    coefficients = launch_coefficients(
        sums, limiter, scalars, growth=growth, front=1.0, behind=1.0, per_tensor=False, counters=counters
    )
    launch_residual(
        param,
        grad,
        scalars,
        rule=COMBINED,
        left=left,
        low_rank=out,
        low_rank_grad=r,
        basis=basis,
        coefficients=coefficients,
        scale=alpha,
        corrected=True,
        skipped=skipped,
    )


def _frugal(
    param, grad, basis, exp_avg, exp_avg_sq, scalars, *, left, beta1, beta2, eps, scale, residual_scale, sign, counters, skipped
):
    r, out = torch.empty_like(exp_avg), torch.empty_like(exp_avg)
    launch_project([grad], [basis], [r], left=left, counters=counters, scalars=scalars)
    launch_adam(
        [r], [out], left=left, exp_avgs=[exp_avg], exp_avg_sqs=[exp_avg_sq], scalars=scalars, beta1=beta1, beta2=beta2, eps=eps
    )
    launch_residual(
        param,
        grad,
        scalars,
        rule=SIGNED if sign else COMBINED,
        left=left,
        low_rank=out,
        low_rank_grad=r,
        basis=basis,
        scale=scale,
        residual_scale=residual_scale,
        skipped=skipped,
    )


def _one(run, param, *tensors, step, lr, beta1, beta2, weight_decay, **rest):
    if param.numel() == 0:
        return
    with on_device_of(param):
        scalars, _ = one_row(step, param.device, lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay)
        run(param, *tensors, scalars, beta1=beta1, beta2=beta2, counters=counters_of(param.device), skipped=None, **rest)


def _many(run, columns, steps, *, lr, beta1, beta2, weight_decay, grad_scale, found_inf, skipped, **rest):
    params = columns[0]
    if not params:
        return
    with on_device_of(params[0]):
        rows, _ = advance(
            steps, lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, grad_scale=grad_scale, found_inf=found_inf
        )
        counters = counters_of(params[0].device)
        for *tensors, scalars in zip(*columns, rows.split(1)):
            if tensors[0].numel():
                run(*tensors, scalars, beta1=beta1, beta2=beta2, counters=counters, skipped=skipped, **rest)


def apollo_step(
    param,
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
    per_tensor=False,
    scale_front=False,
    growth=1.01,
):
    """W <- (1 - lr*weight_decay) W - a sqrt(scale) s o G; shapes, types and state as the oracle's apollo_step."""
    _ops.residual.check_apollo_step(param, grad, basis, exp_avg, exp_avg_sq, limiter, left=left)
    _ops.rules.check_step_and_rate("apollo_step", param.device, step, lr)
    _one(
        _apollo,
        param,
        grad,
        basis,
        exp_avg,
        exp_avg_sq,
        limiter,
        step=step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        scale=scale,
        left=left,
        per_tensor=per_tensor,
        scale_front=scale_front,
        growth=growth,
    )


def fira_step(
    param,
    grad,
    basis,
    exp_avg,
    exp_avg_sq,
    limiter=None,
    gram=None,
    *,
    step,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    alpha,
    left,
    growth=1.01,
):
    """W <- (1 - lr*weight_decay) W - a [alpha back(N) + s o (G - alpha back(R))]; shapes, types and state as the oracle's."""
    _ops.residual.check_fira_step(param, grad, basis, exp_avg, exp_avg_sq, limiter, gram, left=left)
    _ops.rules.check_step_and_rate("fira_step", param.device, step, lr)
    _one(
        _fira,
        param,
        grad,
        basis,
        exp_avg,
        exp_avg_sq,
        limiter,
        gram,
        step=step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        alpha=alpha,
        left=left,
        growth=growth,
    )


def frugal_step(
    param, grad, basis, exp_avg, exp_avg_sq, *, step, lr, beta1, beta2, eps, weight_decay, scale, residual_scale, sign, left
):
    """W <- (1 - lr*weight_decay) W - lr [scale back(Adam(R)) + residual_scale phi(G - back(R))]; as the oracle's frugal_step."""
    _ops.residual.check_frugal_step(param, grad, basis, exp_avg, exp_avg_sq, left=left)
    _ops.rules.check_step_and_rate("frugal_step", param.device, step, lr)
    _one(
        _frugal,
        param,
        grad,
        basis,
        exp_avg,
        exp_avg_sq,
        step=step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        scale=scale,
        residual_scale=residual_scale,
        sign=sign,
        left=left,
    )


def apollo_step_list(
    params,
    grads,
    bases,
    exp_avgs,
    exp_avg_sqs,
    limiters,
    steps,
    *,
    lr,
    left,
    per_tensor=False,
    scale_front=False,
    growth=1.01,
    grad_scale=None,
    found_inf=None,
    skipped=None,
    **hyper,
):
    """apollo_step for many matrices; an empty list of limiters is no limit. Steps and guards as in galore_step_list."""
    lists = params, grads, bases, exp_avgs, exp_avg_sqs
    full = _ops.residual.check_list(
        "apollo_step",
        _ops.residual.check_apollo_step,
        *lists,
        {"limiters": limiters},
        steps,
        lr,
        left,
        (grad_scale, found_inf, skipped),
    )
    _many(
        _apollo,
        (*lists, *full),
        steps,
        lr=lr,
        left=left,
        per_tensor=per_tensor,
        scale_front=scale_front,
        growth=growth,
        grad_scale=grad_scale,
        found_inf=found_inf,
        skipped=skipped,
        **hyper,
    )


def fira_step_list(
    params,
    grads,
    bases,
    exp_avgs,
    exp_avg_sqs,
    limiters,
    grams,
    steps,
    *,
    lr,
    left,
    growth=1.01,
    grad_scale=None,
    found_inf=None,
    skipped=None,
    **hyper,
):
    """fira_step for many matrices; no limiters is no limit, no Gram matrices are orthonormal bases."""
    lists = params, grads, bases, exp_avgs, exp_avg_sqs
    full = _ops.residual.check_list(
        "fira_step",
        _ops.residual.check_fira_step,
        *lists,
        {"limiters": limiters, "grams": grams},
        steps,
        lr,
        left,
        (grad_scale, found_inf, skipped),
    )
    _many(
        _fira,
        (*lists, *full),
        steps,
        lr=lr,
        left=left,
        growth=growth,
        grad_scale=grad_scale,
        found_inf=found_inf,
        skipped=skipped,
        **hyper,
    )


def frugal_step_list(
    params, grads, bases, exp_avgs, exp_avg_sqs, steps, *, lr, left, grad_scale=None, found_inf=None, skipped=None, **hyper
):
    """frugal_step for many matrices. Steps and guards as in galore_step_list."""
    lists = params, grads, bases, exp_avgs, exp_avg_sqs
    _ops.residual.check_list(
        "frugal_step", _ops.residual.check_frugal_step, *lists, {}, steps, lr, left, (grad_scale, found_inf, skipped)
    )
    _many(_frugal, lists, steps, lr=lr, left=left, grad_scale=grad_scale, found_inf=found_inf, skipped=skipped, **hyper)
