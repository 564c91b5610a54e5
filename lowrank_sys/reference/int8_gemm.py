"""Products in INT8: both operands are quantised on the fly, and their codes are multiplied and summed as integers.

Per-group symmetric quantisation as of LLM.int8() (Dettmers et al. 2022), with groups along the summed axis, so that one outlier
costs the precision of its own group only.
"""

import torch

from lowrank_sys.reference.int8 import grouped, inverse, new_scale

GROUP, CODES = 256, 127.0


def quantized(x):
    """Codes (channels, groups, 256), whole numbers in fp64, and scales (channels, groups) of x (channels, depth).

    A group is 256 neighbours along the depth (the last one may be short): scale = absmax / 127, code = x / scale rounded to the
    nearest, ties to even. A group of zeros, or whose scale would be denormal, is all zeros. One that holds a NaN or an infinity
    has codes 0 and scale NaN, which makes every sum with it NaN.
    """
    x = grouped(x.float(), GROUP)
    scale = new_scale(x.abs().amax(2) if x.numel() else x.new_zeros(x.shape[:2]), CODES)
    codes = torch.where(scale.isfinite()[..., None], (x * inverse(scale)[..., None]).round(), 0.0)
    return codes.double(), scale


def int8_gemm(a, b, dtype=torch.float32):
    """A Bᵀ (p, q) of a (p, d) and b (q, d): the sum over groups, in order and in `dtype`, of (scale_a scale_b) dot.

    dot, of two groups' codes, is a whole number below 256 * 127² and exact.
    """
    (codes_a, scale_a), (codes_b, scale_b) = quantized(a), quantized(b)
    scale_a, scale_b = scale_a.to(dtype), scale_b.to(dtype)
    out = torch.zeros(a.shape[0], b.shape[0], dtype=dtype, device=a.device)
    for g in range(codes_a.shape[1]):
        dot = codes_a[:, g] @ codes_b[:, g].T
        out = out + (scale_a[:, g, None] * scale_b[None, :, g]) * dot.to(dtype)
    return out
