"""The inner rules of a step on R, with moments in fp32."""

import triton
import triton.language as tl

from lowrank_sys.kernels import configs
from lowrank_sys.kernels.channels import all_usable, measure, sizes_of, tile_of
from lowrank_sys.kernels.coefficient import NO_COEFFICIENTS, store_coefficients
from lowrank_sys.kernels.common import CORRECTION1, CORRECTION2, GRAD_SCALE, SLOTS, is_off, one_each, pick, store

ADAM, RATIO = (tl.constexpr(i) for i in range(2))


@triton.jit
def advance_moments(b_g, b_ok, p_exp_avg, p_exp_avg_sq, m_tile, beta1, beta2, gain1, gain2):
    """Advance the moments of a tile in place where `b_ok`; return both."""
    b_m = tl.load(p_exp_avg, mask=m_tile, other=0.0)
    b_v = tl.load(p_exp_avg_sq, mask=m_tile, other=0.0)
    # Selected values rather than a masked store: a mask that differs along the channels would break up 16-byte stores.
    b_m = tl.where(b_ok, beta1 * b_m + gain1 * b_g, b_m)
    b_v = tl.where(b_ok, beta2 * b_v + gain2 * b_g * b_g, b_v)
    tl.store(p_exp_avg, b_m, mask=m_tile)
    tl.store(p_exp_avg_sq, b_v, mask=m_tile)
    return b_m, b_v


# Plain division is good to 2 ulp; the plain square root would flush a small v to zero, and a tiny eps would not save it.


@triton.jit
def adam(b_m, b_v, scalars, eps):
    """m̂ / (sqrt(v̂) + eps), Kingma and Ba 2015, with torch.optim.AdamW's bias corrections."""
    b_m = b_m / tl.load(scalars + CORRECTION1)
    return b_m / (tl.sqrt_rn(b_v / tl.load(scalars + CORRECTION2)) + eps)


@triton.jit
def ratio(b_m, b_v, eps):
    """N = M / (sqrt(V) + eps), as in APOLLO's and Fira's code."""
    return b_m / (tl.sqrt_rn(b_v) + eps)


@triton.jit
def rule_kernel(
    low_rank_grad,
    gram_grad,
    out,
    exp_avg,
    exp_avg_sq,
    squares,
    coefficients,
    limiter,
    norms,
    counters,
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
    growth,
    front,
    behind,
    LEFT: tl.constexpr,
    RULE: tl.constexpr,
    PER_TENSOR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = X = RULE(grad_scale * R) for R (r, channels) if LEFT, else (channels, r); NaN in channels that are not usable.

    ADAM: usable if every entry is. RATIO, for one matrix: if the squares of the channel are finite; out may be None, and the launch
    ends with the channels' coefficients, see `store_coefficients`. A program owns whole channels: it tests them, then steps. A
    launch serves several matrices of one shape: R, out and the moments are tuples, scalars has a row a matrix.

    Bytes per element of R: R twice (the second time from the cache), moments twice each, gram_grad and out once.
    """
    i_matrix = tl.program_id(1)
    low_rank_grad, exp_avg, exp_avg_sq = pick(low_rank_grad, i_matrix), pick(exp_avg, i_matrix), pick(exp_avg_sq, i_matrix)
    if out is not None:
        out = pick(out, i_matrix)
    scalars += i_matrix * SLOTS
    if is_off(scalars):
        return
    o_c = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    grad_scale = tl.load(scalars + GRAD_SCALE)
    if RULE == RATIO:
        b_ok, b_r, b_residual = measure(
            low_rank_grad, gram_grad, squares, grad_scale, o_c, channels, r, splits, alpha, LEFT, BLOCK_R, BLOCK_C
        )
    else:
        b_ok = all_usable(low_rank_grad, grad_scale, o_c, channels, r, LEFT, BLOCK_R, BLOCK_C)
    b_wide = b_ok[None, :] if LEFT else b_ok[:, None]

    b_sum = tl.zeros([BLOCK_R, BLOCK_C] if LEFT else [BLOCK_C, BLOCK_R], tl.float32)
    for i_r in range(0, r, BLOCK_R):
        o_tile, m_tile = tile_of(i_r, o_c, channels, r, LEFT, BLOCK_R)
        b_g = tl.load(low_rank_grad + o_tile, mask=m_tile, other=0.0) * grad_scale
        b_m, b_v = advance_moments(b_g, b_wide, exp_avg + o_tile, exp_avg_sq + o_tile, m_tile, beta1, beta2, gain1, gain2)
        if RULE == RATIO:
            b_x = ratio(b_m, b_v, eps)
            b_sum += tl.where(m_tile, b_x * b_x, 0.0)
        else:
            b_x = adam(b_m, b_v, scalars, eps)
        if out is not None:
            store(out + o_tile, tl.where(b_wide, b_x, float("nan")), m_tile)
    if RULE == RATIO:
        b_squares = tl.where(b_ok, tl.sum(b_sum, axis=0 if LEFT else 1), float("nan"))
        store_coefficients(
            b_squares,
            b_r,
            b_residual,
            o_c,
            coefficients,
            limiter,
            norms,
            counters,
            scalars,
            channels,
            growth,
            front,
            behind,
            PER_TENSOR,
        )


def launch_rule(
    low_rank_grads,
    outs,
    moments,
    scalars,
    *,
    rule,
    left,
    beta1,
    beta2,
    eps,
    squares=None,
    gram_grad=None,
    alpha=0.0,
    room=NO_COEFFICIENTS,
):
    """outs <- the rule's update from R, for matrices of one shape; NaN in channels that are left out.

    outs: R's shape, fp32 or the bases' type, or None; moments: exp_avgs and exp_avg_sqs, advanced in place; scalars: a row a
    matrix. For RATIO, one matrix: what the squares are made from, and `room` for the coefficients.
    """
    sizes, programs = sizes_of(low_rank_grads[0], left)
    exp_avgs, exp_avg_sqs = moments
    rule_kernel[programs, len(low_rank_grads)](
        low_rank_grad=one_each(low_rank_grads),
        gram_grad=gram_grad,
        out=None if outs is None else one_each(outs),
        exp_avg=one_each(exp_avgs),
        exp_avg_sq=one_each(exp_avg_sqs),
        squares=squares,
        scalars=scalars,
        splits=0 if squares is None else squares.shape[0],
        alpha=alpha,
        beta1=beta1,
        beta2=beta2,
        gain1=1 - beta1,
        gain2=1 - beta2,
        eps=eps,
        RULE=rule.value,
        **room,
        **sizes,
        **configs.OPTIONS,
    )
