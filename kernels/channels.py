"""What a step needs of whole channels of R: which are usable, and the sums of their squares."""

import triton
import triton.language as tl

from lowrank_sys._ops import numerics
from lowrank_sys.kernels import configs
from lowrank_sys.kernels.coefficient import NO_COEFFICIENTS, store_coefficients
from lowrank_sys.kernels.common import GRAD_SCALE, is_off

MAX_GRADIENT = tl.constexpr(numerics.MAX_GRADIENT)
# Rows of the sums of a channel that wait for a step of 8-bit moments: of R², and of the squares of its residual.
R_SQUARES, RESIDUAL = (tl.constexpr(i) for i in range(2))


@triton.jit
def usable_channels(b_g, LEFT: tl.constexpr):
    """Which channels of a tile of R may enter a moment: all |g| < 2^64, so none is NaN and no square overflows."""
    return tl.min((tl.abs(b_g) < MAX_GRADIENT).to(tl.int32), axis=0 if LEFT else 1, keep_dims=True) == 1


@triton.jit
def tile_of(i_r, o_c, channels, r, LEFT: tl.constexpr, BLOCK_R: tl.constexpr):
    """(offsets, mask) of a tile of R, (BLOCK_R, channels) if LEFT, else (channels, BLOCK_R)."""
    o_r = (i_r + tl.arange(0, BLOCK_R)).to(tl.int64)
    m_c, m_r = o_c < channels, o_r < r
    if LEFT:
        return o_r[:, None] * channels + o_c[None, :], m_r[:, None] & m_c[None, :]
    return o_c[:, None] * r + o_r[None, :], m_c[:, None] & m_r[None, :]


@triton.jit
def all_usable(low_rank_grad, grad_scale, o_c, channels, r, LEFT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Which channels (BLOCK_C,) of R are usable to Adam."""
    b_ok = tl.full([1, BLOCK_C] if LEFT else [BLOCK_C, 1], 1, tl.int1)
    for i_r in range(0, r, BLOCK_R):
        o_tile, m_tile = tile_of(i_r, o_c, channels, r, LEFT, BLOCK_R)
        b_ok = b_ok & usable_channels(tl.load(low_rank_grad + o_tile, mask=m_tile, other=0.0) * grad_scale, LEFT)
    return tl.reshape(b_ok, [BLOCK_C])


@triton.jit
def measure(
    low_rank_grad,
    gram_grad,
    squares,
    grad_scale,
    o_c,
    channels,
    r,
    splits,
    alpha,
    LEFT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Which channels have finite squares, |R|², and with squares |G - alpha back(R)|², else zeros, each (BLOCK_C,).

    squares (splits, channels) are parts of |G|²; gram_grad is (BᵀB)R, None for an orthonormal basis.
    """
    b_sum = tl.zeros([BLOCK_R, BLOCK_C] if LEFT else [BLOCK_C, BLOCK_R], tl.float32)
    b_inside = b_sum
    for i_r in range(0, r, BLOCK_R):
        o_tile, m_tile = tile_of(i_r, o_c, channels, r, LEFT, BLOCK_R)
        b_g = tl.load(low_rank_grad + o_tile, mask=m_tile, other=0.0) * grad_scale
        b_sum += b_g * b_g
        if gram_grad is not None:
            b_inside += b_g * (tl.load(gram_grad + o_tile, mask=m_tile, other=0.0) * grad_scale)
    m_c = o_c < channels
    b_r_squares = tl.sum(b_sum, axis=0 if LEFT else 1)
    b_ok = b_r_squares < float("inf")
    b_residual = tl.zeros([BLOCK_C], tl.float32)
    if squares is not None:
        for _ in range(splits):
            b_residual += tl.load(squares + o_c, mask=m_c, other=0.0)
            squares += channels
        b_ok = b_ok & (b_residual < float("inf"))
        b_in_basis = b_r_squares
        if gram_grad is not None:
            b_in_basis = tl.sum(b_inside, axis=0 if LEFT else 1)
        b_residual = b_residual * grad_scale * grad_scale - 2 * alpha * b_r_squares + alpha * alpha * b_in_basis
        b_residual = tl.where(b_ok, tl.maximum(b_residual, 0.0), 0.0)
    return b_ok, b_r_squares, b_residual


@triton.jit
def sums_kernel(
    low_rank,
    gram_grad,
    squares,
    sums,
    coefficients,
    limiter,
    norms,
    counters,
    scalars,
    channels,
    r,
    splits,
    alpha,
    growth,
    front,
    behind,
    LEFT: tl.constexpr,
    BEFORE: tl.constexpr,
    PER_TENSOR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What RATIO needs of a channel beside a step of 8-bit moments: sums (2, channels) <- those of R if BEFORE, see `measure`, else
    the coefficients from them and from N.

    A channel whose squares are not finite is made NaN in R, so that the step leaves it out: N and |N|² are NaN there.

    Bytes: R or N once, gram_grad once, sums (residuals with a limiter alone) once each way, and those of `store_coefficients`.
    """
    if is_off(scalars):
        return
    o_c = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    m_c = o_c < channels
    if BEFORE:
        grad_scale = tl.load(scalars + GRAD_SCALE)
        b_ok, b_r, b_residual = measure(
            low_rank, gram_grad, squares, grad_scale, o_c, channels, r, splits, alpha, LEFT, BLOCK_R, BLOCK_C
        )
        tl.store(sums + R_SQUARES * channels + o_c, b_r, mask=m_c)
        if squares is not None:
            tl.store(sums + RESIDUAL * channels + o_c, b_residual, mask=m_c)
        if tl.min(b_ok.to(tl.int32)) == 0:
            b_bad = ~b_ok[None, :] if LEFT else ~b_ok[:, None]
            for i_r in range(0, r, BLOCK_R):
                o_tile, m_tile = tile_of(i_r, o_c, channels, r, LEFT, BLOCK_R)
                tl.store(low_rank + o_tile, tl.full(o_tile.shape, float("nan"), tl.float32), mask=m_tile & b_bad)
    else:
        b_sum = tl.zeros([BLOCK_R, BLOCK_C] if LEFT else [BLOCK_C, BLOCK_R], tl.float32)
        for i_r in range(0, r, BLOCK_R):
            o_tile, m_tile = tile_of(i_r, o_c, channels, r, LEFT, BLOCK_R)
            b_n = tl.load(low_rank + o_tile, mask=m_tile, other=0.0)
            b_sum += b_n * b_n
        b_r = tl.load(sums + R_SQUARES * channels + o_c, mask=m_c, other=0.0)
        b_residual = b_r
        if limiter is not None:
            b_residual = tl.load(sums + RESIDUAL * channels + o_c, mask=m_c, other=0.0)
        store_coefficients(
            tl.sum(b_sum, axis=0 if LEFT else 1),
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


def sizes_of(low_rank, left):
    """What a launch over the channels of R is given of its sizes, and its number of programs."""
    channels, r = low_rank.shape[::-1] if left else low_rank.shape
    return {"channels": channels, "r": r, "LEFT": left, **configs.RULE}, configs.cdiv(channels, configs.RULE["BLOCK_C"])


def launch_sums(low_rank, sums, scalars, *, left, squares=None, gram_grad=None, alpha=0.0, room=None):
    """sums (2, channels) <- those of R before a step of 8-bit moments, R being made NaN where a channel is not usable; with `room`,
    what is there for the coefficients, these from the sums and from N."""
    sizes, programs = sizes_of(low_rank, left)
    sums_kernel[programs,](
        low_rank=low_rank,
        gram_grad=gram_grad,
        squares=squares,
        sums=sums,
        scalars=scalars,
        splits=0 if squares is None else squares.shape[0],
        alpha=alpha,
        BEFORE=room is None,
        **(room or NO_COEFFICIENTS),
        **sizes,
        **configs.OPTIONS,
    )
