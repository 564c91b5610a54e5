"""What the channels of a scaled gradient are multiplied by: norm ratios, under a limiter of their growth.

They end the launch that has the last of the sums: of the rule on R, or of the squares behind a step of 8-bit moments.
"""

import torch
import triton
import triton.language as tl

from lowrank_sys.kernels import configs
from lowrank_sys.kernels.common import GRAD_SCALE
from lowrank_sys.reference.low_rank_step import TINY as tiny

TINY = tl.constexpr(tiny)
BLOCK = tl.constexpr(256)
# A launch that makes none.
NO_COEFFICIENTS = dict.fromkeys(("coefficients", "limiter", "norms", "counters")) | {
    "growth": 1.0,
    "front": 1.0,
    "behind": 1.0,
    "PER_TENSOR": False,
}


@triton.jit
def total(p_parts, parts):
    b_sum = tl.zeros([BLOCK], tl.float64)
    for i in range(0, parts, BLOCK):
        o = i + tl.arange(0, BLOCK)
        b_sum += tl.load(p_parts + o, mask=o < parts, other=0.0, cache_modifier=".cg")
    return tl.sum(b_sum)


@triton.jit
def store_coefficients(
    b_n,
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
    PER_TENSOR: tl.constexpr,
):
    """coefficients <- grad_scale * front * behind * |N| / (|R| + 1e-8) over the limiter's divisor; NaN where not usable.

    b_n, b_r and b_residual are the squares of the program's channels `o_c`: of N, NaN where a channel is not usable, of R, and of
    the residual, which only a limiter asks for. The norm of front * ratio * residual may grow by `growth` a step; `limiter` holds
    the last one, 0 before the first (Fira, Chen et al. 2024). For one ratio for the matrix and for the limiter, norms
    (3, programs) get the programs' sums: of N², of R², and of the squared residuals, scaled unless there is one ratio. They are
    fp64, because squares leave the range of fp32. The last program adds them in order, so that the result does not depend on
    timing, and multiplies all coefficients by what they share, unless that is 1.

    Bytes: coefficients once, or three times where they are multiplied.
    """
    i, programs = tl.program_id(0), tl.num_programs(0)
    m_c = o_c < channels
    b_ok = b_n == b_n
    b_s = tl.full(b_n.shape, 1.0, tl.float32)
    if not PER_TENSOR:
        b_s = tl.sqrt_rn(b_n) / (tl.sqrt_rn(b_r) + TINY)
    b_c = b_s * front * behind * tl.load(scalars + GRAD_SCALE)
    tl.store(coefficients + o_c, tl.where(b_ok, b_c, float("nan")), mask=m_c)
    if norms is not None:
        if PER_TENSOR:
            tl.store(norms + i, tl.sum(tl.where(b_ok, b_n, 0.0).to(tl.float64)))
            tl.store(norms + programs + i, tl.sum(tl.where(b_ok, b_r, 0.0).to(tl.float64)))
        if limiter is not None:
            b_norm = tl.where(b_ok, b_s * tl.sqrt_rn(b_residual), 0.0).to(tl.float64)
            tl.store(norms + 2 * programs + i, tl.sum(b_norm * b_norm))
        # All threads' stores come before the count that publishes them.
        tl.debug_barrier()
        if tl.atomic_add(counters, 1, sem="acq_rel") == programs - 1:
            tl.store(counters, 0)
            shared = tl.full([], 1.0, tl.float64)
            if PER_TENSOR:
                shared = tl.sqrt(total(norms, programs)) / (tl.sqrt(total(norms + programs, programs)) + TINY)
            if limiter is not None:
                norm = front * shared * tl.sqrt(total(norms + 2 * programs, programs))
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


def room_for_coefficients(channels, limiter, counters, device, *, growth, front, behind, per_tensor):
    """What a launch of rules is given for the coefficients (channels,), which are its entry "coefficients"."""
    programs = configs.cdiv(channels, configs.RULE["BLOCK_C"])
    apart = limiter is None and not per_tensor
    return {
        "coefficients": torch.empty(channels, dtype=torch.float32, device=device),
        "limiter": limiter,
        "norms": None if apart else torch.empty((3, programs), dtype=torch.float64, device=device),
        "counters": None if apart else counters,
        "growth": growth,
        "front": front,
        "behind": behind,
        "PER_TENSOR": per_tensor,
    }
