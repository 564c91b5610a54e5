"""What the products end in: Adam on a tile of R, the sum of a split product, and the update of a tile of W."""

import triton
import triton.language as tl

from lowrank_sys.kernels.channels import usable_channels
from lowrank_sys.kernels.common import GRAD_SCALE, store, store_drawn
from lowrank_sys.kernels.random import random16, random16_rows
from lowrank_sys.kernels.rule import adam, advance_moments


@triton.jit
def finish(b_r, out, exp_avg, exp_avg_sq, scalars, o_tile, m_tile, beta1, beta2, gain1, gain2, eps, LEFT: tl.constexpr):
    """Store a tile of R, or advance Adam with it and store the update."""
    if exp_avg is not None:
        b_r = b_r * tl.load(scalars + GRAD_SCALE)
        b_ok = usable_channels(b_r, LEFT)
        b_m, b_v = advance_moments(b_r, b_ok, exp_avg + o_tile, exp_avg_sq + o_tile, m_tile, beta1, beta2, gain1, gain2)
        b_r = tl.where(b_ok, adam(b_m, b_v, scalars, eps), float("nan"))
    store(out + o_tile, b_r, m_tile)


@triton.jit
def store_part(b_r, partials, counters, i_tile, i_split, splits, size, o_tile, m_tile):
    """Store one of the `splits` parts of a tile; whether it was the last. Partials and counters are this matrix' own."""
    tl.store(partials + i_split * size + o_tile, b_r, mask=m_tile, cache_modifier=".cg")
    # All threads' stores come before the count that publishes them.
    tl.debug_barrier()
    last = tl.atomic_add(counters + i_tile, 1, sem="acq_rel") == splits - 1
    if last:
        tl.store(counters + i_tile, 0)
    return last


@triton.jit
def sum_parts(partials, splits, size, o_tile, m_tile):
    """The sum of the parts at offsets `o_tile`, in order, so that results do not depend on timing."""
    b_r = tl.zeros(o_tile.shape, tl.float32)
    for _ in range(splits):
        b_r += tl.load(partials + o_tile, mask=m_tile, other=0.0, cache_modifier=".cg")
        partials += size
    return b_r


@triton.jit
def finish_sum(b_r, partials, counters, i_tile, i_split, splits, size, o_tile, m_tile):
    """(the whole sum of a tile whose parts `splits` programs hold, whether this program is the one that has it)."""
    last = True
    if partials is not None:
        last = store_part(b_r, partials, counters, i_tile, i_split, splits, size, o_tile, m_tile)
        if last:
            b_r = sum_parts(partials, splits, size, o_tile, m_tile)
    return b_r, last


@triton.jit
def count_left_out(skipped, b_update, m_w):
    """Add the weights of a tile whose update is not finite to `skipped`, if it is there."""
    if skipped is not None:
        count = tl.sum((m_w & ~(tl.abs(b_update) < float("inf"))).to(tl.int32))
        if count > 0:
            tl.atomic_add(skipped, count.to(tl.int64), sem="relaxed")


@triton.jit
def write_weight(
    b_update,
    param,
    alpha,
    decay,
    skipped,
    i_m,
    i_n,
    m,
    n,
    seed,
    step,
    parameter,
    first,
    STEP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """W <- decay W + alpha update on tile (i_m, i_n). In a STEP an element whose update is not finite keeps its bytes.

    With the `step` (int64, on the device) of random bits W, in 16 bits, is rounded stochastically; ALIGNED as in `update_int8`.
    """
    o_m = (i_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    p_w = param + o_m[:, None] * n + o_n[None, :]
    m_w = (o_m < m)[:, None] & (o_n < n)[None, :]
    b_w = tl.load(p_w, mask=m_w, other=0.0).to(tl.float32)
    if not STEP:
        b_w = tl.where(decay == 0, 0.0, b_w)  # as in BLAS, 0 * NaN is 0
    b_new = decay * b_w + alpha * b_update
    if STEP:
        b_new = tl.where(tl.abs(b_update) < float("inf"), b_new, b_w)
        count_left_out(skipped, b_update, m_w)
    if step is None:
        store(p_w, b_new, m_w)
    else:
        o_first = first + o_m * n + i_n * BLOCK_N
        if ALIGNED:
            b_random = random16_rows(seed, tl.load(step), parameter, o_first, BLOCK_N)
        else:
            b_random = random16(seed, tl.load(step), parameter, o_first[:, None] + tl.arange(0, BLOCK_N)[None, :])
        store_drawn(p_w, b_new, m_w, b_random)
