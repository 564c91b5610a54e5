"""A subspace of DCT columns picked by alignment with the gradient (DCT-AdamW, Modoranu et al. 2025).

D (d, d) is the orthonormal DCT-II basis of the projected axis: D[i, k] = s_k cos(pi (2 i + 1) k / (2 d)), s_0 = sqrt(1/d),
s_k = sqrt(2/d) otherwise. Nothing is kept from call to call, so matrices of any widths mix.
"""

import math

import torch

from lowrank_sys import _ops
from lowrank_sys._ops.numerics import accumulator, usable
from lowrank_sys.subspace.shards import WHOLE

# Elements of G that are transformed at once, on the CPU (where they should stay in the cache) and elsewhere.
PANEL = {"cpu": 1 << 19}
WIDE_PANEL = 1 << 24


def lengths(k, d):
    """s_k, in fp64."""
    return ((2 - (k == 0).double()) / d).sqrt()


def dct_columns(indices, *, d):
    """D[:, indices]: (d, r) fp32, orthonormal columns. indices (r,) int32 in [0, d).

    The angle is reduced as an integer, so that every entry is exact to the rounding of fp32.
    """
    _ops.dct.check_dct_columns(indices, d=d)
    odd = 2 * torch.arange(d, device=indices.device)[:, None] + 1
    k = indices.long()
    angle = (odd * k % (4 * d)).double() * (math.pi / (2 * d))
    return (lengths(k, d) * angle.cos()).float()


def turns(d, like):
    """The factors s_k exp(-i pi k / (2 d)) of `dct`, k = 0 ... d/2."""
    k = torch.arange(d // 2 + 1, device=like.device, dtype=torch.float64)
    return torch.polar(lengths(k, d), -math.pi / (2 * d) * k).to(torch.promote_types(like.dtype, torch.complex64))


def dct(x, factors):
    """DCT-II of the rows of x (c, d) by one real FFT of their even entries followed by the reversed odd ones (Makhoul 1980).

    Returns Z (c, d/2 + 1), complex: S[:, k] = Re Z[:, k] and S[:, d - k] = -Im Z[:, k]. factors: `turns`.
    """
    return torch.fft.rfft(torch.cat([x[:, ::2], x[:, 1::2].flip(1)], dim=1)).mul_(factors)


def column_norms(grad, *, left, norm=1):
    """l1 or l2 norm of every column of S = G D if right, of every row of Dᵀ G if left: (d,) fp32.

    Channels of G with a value that is not finite count as 0. G is transformed panel by panel: S is never stored.
    """
    d, channels = grad.shape if left else grad.shape[::-1]
    total = torch.zeros(d, dtype=accumulator(grad), device=grad.device)
    factors = turns(d, total)
    high = max(1, PANEL.get(grad.device.type, WIDE_PANEL) // max(d, 1))
    for begin in range(0, channels, high):
        panel = (grad[:, begin : begin + high].T if left else grad[begin : begin + high]).to(total.dtype)
        panel = torch.where(usable(panel).all(dim=1, keepdim=True), panel, 0)
        z = torch.view_as_real(dct(panel, factors))
        sums = (z.abs() if norm == 1 else z.square()).sum(dim=0)
        total[: len(sums)] += sums[:, 0]
        total[len(sums) :] += sums[1 : d - len(sums) + 1, 1].flip(0)
    return total if norm == 1 else total.sqrt()


def dct_select(grad, *, rank, left, norm=1):
    """The `rank` columns of D on which G (m, n) is largest.

    Args:
        grad: (m, n), fp32 | bf16 | fp16. A channel with a value that is not finite is left out.
        rank: r, at most the projected axis, m if left, else n.
        norm: 1 (the method's own) or 2 (the best rank-r choice of columns).

    Returns:
        indices: (r,) int32, ascending; `dct_columns` gives the basis.
        norms: (r,) fp32, the norms of these columns of S = G D (left: rows of Dᵀ G).
    """
    _ops.dct.check_dct_select(grad, rank=rank, left=left, norm=norm)
    return select_columns(grad, rank=rank, left=left, norm=norm)


def select_columns(grad, *, rank, left, norm, shard=WHOLE):
    """dct_select without its checks. shard: that the rows of G are of, on the right side."""
    norms = column_norms(grad, left=left, norm=norm)
    norms = shard.sum(norms) if norm == 1 else shard.norms(norms)
    indices, _ = torch.ops.lowrank.select_rows(norms, r=rank, method="top")
    return indices, norms[indices.long()]
