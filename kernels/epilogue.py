"""What the products end in: Adam on a tile of R, the sum of a split product, and the update of a tile of W."""

import triton
import triton.language as tl

from lowrank_sys.kernels.common import ALPHA, DECAY, GRAD_SCALE, adam, store, usable_channels


@triton.jit
def finish(b_r, out, exp_avg, exp_avg_sq, scalars, o_tile, m_tile, beta1, beta2, gain1, gain2, eps, LEFT: tl.constexpr):
    """Store a tile of R, or advance Adam with it and store the update."""
    if exp_avg is not None:
        b_r = b_r * tl.load(scalars + GRAD_SCALE)
        b_ok = usable_channels(b_r, LEFT)
        b_r = adam(b_r, b_ok, exp_avg + o_tile, exp_avg_sq + o_tile, m_tile, scalars, beta1, beta2, gain1, gain2, eps)
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
def write_weight(b_back, param, scalars, skipped, i_m, i_n, m, n, STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tile (i_m, i_n) of W <- decay W + alpha back, by the rules of `back_project_kernel`."""
    o_m = (i_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    m_m, m_n = o_m < m, o_n < n
    p_w = param + o_m[:, None] * n + o_n[None, :]
    m_w = m_m[:, None] & m_n[None, :]
    b_w = tl.load(p_w, mask=m_w, other=0.0).to(tl.float32)
    decay = tl.load(scalars + DECAY)
    if not STEP:
        b_w = tl.where(decay == 0, 0.0, b_w)  # as in BLAS, 0 * NaN is 0
    b_new = decay * b_w + tl.load(scalars + ALPHA) * b_back
    if STEP:
        b_ok = tl.abs(b_back) < float("inf")
        b_new = tl.where(b_ok, b_new, b_w)
        if skipped is not None:
            count = tl.sum((m_w & ~b_ok).to(tl.int32))
            if count > 0:
                tl.atomic_add(skipped, count.to(tl.int64), sem="relaxed")
    store(p_w, b_new, m_w)
