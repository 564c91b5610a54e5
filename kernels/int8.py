"""INT8 weights in a kernel: a tile is updated and rounded stochastically, to the bits of csrc/core/int8.h and the oracle."""

import triton
import triton.language as tl

from lowrank_sys.kernels.random import random16, random16_rows
from lowrank_sys.reference import int8 as reference

CODES, LEAST_SCALE = tl.constexpr(reference.CODES), tl.constexpr(reference.LEAST_SCALE)
UNIT = tl.constexpr(1 / reference.UNIT)
INFINITY_BITS = tl.constexpr(0x7F800000)
# Added to a number from 0 to 2²³ and taken away again it rounds to the nearest integer, ties to even.
ROUND = tl.constexpr(2.0**23)


def aligned(n, offset):
    """Whether eight neighbours, which share a draw of random bits, never span two rows: `offset` counts elements before (0, 0)."""
    return n % 8 == 0 and offset % 8 == 0


@triton.jit
def inverse_of(b_scale):
    """1 / scale where that is a normal number, else 0."""
    b_normal = (b_scale >= LEAST_SCALE) & (b_scale < float("inf"))
    return tl.where(b_normal, tl.div_rn(tl.full(b_scale.shape, 1.0, tl.float32), tl.where(b_normal, b_scale, 1.0)), 0.0)


@triton.jit
def magnitude(b_x):
    """|x| as an integer that orders like it, with NaN above infinity."""
    return b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def update_int8(
    b_update,
    codes,
    weight_scale,
    i_m,
    i_n,
    m,
    n,
    alpha,
    decay,
    seed,
    step,
    parameter,
    offset,
    INT8_GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """W <- decay W + alpha update on tile (i_m, i_n), in place, as `int8_update_`: BLOCK_N holds whole groups.

    Rounded up iff u < frac(y), with the random bits of elements offset + i n + j. A group keeps its scale while all fits and the
    largest is at least half of the range; a group in which nothing moves keeps its bytes. An element whose alpha * update, or whose
    new value, is not finite keeps its code, or its value if its group gets a new scale.

    Bytes: codes and scales read once and written once.
    """
    PARTS: tl.constexpr = BLOCK_N // INT8_GROUP
    o_m = (i_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    m_w = (o_m < m)[:, None] & (o_n < n)[None, :]
    p_codes = codes + o_m[:, None] * n + o_n[None, :]
    groups = tl.cdiv(n, INT8_GROUP)
    o_group = (i_n * PARTS + tl.arange(0, PARTS)).to(tl.int64)
    p_scale = weight_scale + o_m[:, None] * groups + o_group[None, :]
    m_scale = (o_m < m)[:, None] & (o_group < groups)[None, :]

    b_scale = tl.load(p_scale, mask=m_scale, other=0.0)[:, :, None]
    b_code = tl.reshape(tl.load(p_codes, mask=m_w, other=0).to(tl.float32), [BLOCK_M, PARTS, INT8_GROUP])
    # What a product holds outside of the matrix moves no scale.
    b_step = tl.reshape(tl.where(m_w, alpha * b_update, 0.0), [BLOCK_M, PARTS, INT8_GROUP])

    # In units of the scale: what stays is a code already, which rounding leaves alone.
    b_factor = inverse_of(b_scale)
    b_y = tl.where(tl.abs(b_step) < float("inf"), decay * b_code + b_step * b_factor, b_code)
    b_moved = tl.max((b_y != b_code).to(tl.int32), axis=2, keep_dims=True) > 0
    b_most = tl.max(magnitude(b_y), axis=2, keep_dims=True).to(tl.float32, bitcast=True)
    b_keep = (b_factor != 0) & (~b_moved | ((b_most <= CODES) & (b_most >= 0.5 * CODES)))
    # Few tiles hold a group that needs a new scale: as values, what that is made from.
    if tl.min(b_keep.to(tl.int32)) == 0:
        b_kept = b_code * b_scale
        b_value = decay * b_kept + b_step
        b_value = tl.where(tl.abs(b_value) < float("inf"), b_value, b_kept)
        b_moved = tl.max((b_value != b_kept).to(tl.int32), axis=2, keep_dims=True) > 0
        b_largest = tl.max(magnitude(b_value), axis=2, keep_dims=True)
        b_renew = ~b_keep & b_moved & (b_largest < INFINITY_BITS)
        b_fresh = tl.where(b_renew, b_largest, 0).to(tl.float32, bitcast=True) * UNIT
        b_fresh = tl.where(b_fresh >= LEAST_SCALE, b_fresh, 0.0)
        b_y = tl.where(b_renew, b_value * inverse_of(b_fresh), tl.where(b_keep, b_y, b_code))
        b_scale = tl.where(b_renew, b_fresh, b_scale)
    tl.store(p_scale, tl.reshape(b_scale, [BLOCK_M, PARTS]), mask=m_scale)

    b_fixed = ((tl.abs(b_y) * 65536.0 + ROUND) - ROUND).to(tl.int32)
    b_fixed = tl.reshape(tl.where(b_y < 0, -b_fixed, b_fixed), [BLOCK_M, BLOCK_N])
    o_first = offset + o_m * n + i_n * BLOCK_N
    if ALIGNED:
        b_random = random16_rows(seed, step, parameter, o_first, BLOCK_N)
    else:
        b_random = random16(seed, step, parameter, o_first[:, None] + tl.arange(0, BLOCK_N)[None, :])
    tl.store(p_codes, ((b_fixed + (0xFFFF - b_random.to(tl.int32))) >> 16).to(tl.int8), mask=m_w)
