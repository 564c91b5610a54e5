"""INT8 weights: symmetric codes with a scale a group, and updates that are rounded stochastically.

Q-GaLore (Zhang et al. 2024, section 3.4) trains INT8 weights with stochastic rounding and keeps no high-precision copy. Here
the groups are symmetric, and a scale stays as it is until a value no longer fits: with a fresh scale a step, every weight of a
group would be rounded again even where its update is zero.

Codes are exact functions of fp32 inputs, whatever the precision of the other results.
"""

import torch

from lowrank_sys import _ops
from lowrank_sys.reference.philox import random16

CODES, UNIT = 127.0, 119.0
LEAST_SCALE = 2.0**-126


def grouped(matrix, group_size):
    """(m, n) -> (m, ⌈n/group_size⌉, group_size), the last group filled up with zeros."""
    m, n = matrix.shape
    groups = (n + group_size - 1) // group_size
    return torch.nn.functional.pad(matrix, (0, groups * group_size - n)).reshape(m, groups, group_size)


def ungrouped(groups, n):
    return groups.reshape(groups.shape[0], groups.shape[1] * groups.shape[2])[:, :n]


def new_scale(largest, unit=UNIT):
    """Scales (fp32) of groups by their largest magnitudes, which get code `unit`: 119 of 127 leaves 1/16 as headroom."""
    scale = largest * torch.tensor(1 / unit, dtype=torch.float32, device=largest.device)
    scale = torch.where(scale >= LEAST_SCALE, scale, 0.0)
    return torch.where(largest.isfinite(), scale, torch.nan)


def inverse(scale):
    """1 / scale where that is a normal number, else 0."""
    return torch.where((scale >= LEAST_SCALE) & scale.isfinite(), 1 / scale, 0.0)


def quantize_int8(weight, *, group_size=256):
    """codes (m, n) int8 and scale (m, ⌈n/group_size⌉) fp32 of a weight (m, n) fp32 | bf16 | fp16.

    A group is `group_size` (a power of two from 32 to 1024) neighbours of a row: scale = absmax / 119, code = weight / scale
    rounded to the nearest, ties to even. A group of zeros, or whose scale would be denormal, is all zeros with scale 0. A
    group that holds a NaN or an infinity has codes 0 and scale NaN, so that all of it is NaN.
    """
    _ops.int8.check_quantize_int8(weight, group_size=group_size)
    w = grouped(weight.float(), group_size)
    scale = new_scale(w.abs().amax(2) if w.numel() else w.new_zeros(w.shape[:2]))
    codes = torch.where(scale.isfinite()[..., None], (w * inverse(scale)[..., None]).round(), 0.0).to(torch.int8)
    return ungrouped(codes, weight.shape[1]).contiguous(), scale


def dequantize_int8(codes, scale, *, group_size=256, dtype=None):
    """W = scale * code (m, n), in fp32 or `dtype` (fp32 | bf16 | fp16): the fp32 product, rounded to it."""
    _ops.int8.check_dequantize_int8(codes, scale, group_size=group_size, dtype=dtype)
    w = ungrouped(grouped(codes.float(), group_size) * scale[..., None], codes.shape[1])
    return w.to(dtype or torch.float32).contiguous()


def int8_update_(codes, scale, update, *, alpha=1.0, decay=1.0, seed, step, parameter, offset=0, group_size=256):
    """W <- decay W + alpha update, rounded stochastically, in place: no copy of W in higher precision is kept.

    update (m, n) fp32 | bf16 | fp16. alpha, decay and step are numbers or 0-dim tensors (a step tensor counts modulo 2³²);
    seed has 64 bits (a signed integer), step and parameter 32. The random bits of element (i, j) are those of element
    offset + i n + j of the unsharded tensor: a shard of rows draws what the whole would.

    In units of the scale y = decay code + alpha update / scale, in fixed point with 16 bits of fraction, goes to the next code
    up iff u < frac(y), u the 16 random bits over 2¹⁶, else down: unbiased to 2⁻¹⁷ of a step, and an exact code stays. Nothing
    is clamped: a group in which some |y| > 127, or all |y| < 127 / 2, gets a new scale as in `quantize_int8`, and its values
    are rounded stochastically to that. A group where no y differs from its code keeps its bytes.

    An element whose alpha * update, or whose new value, is not finite is left out: it keeps its code, or its value if its
    group gets a new scale. A group whose scale is not finite is left as it is.
    """
    _ops.int8.check_int8_update(
        codes, scale, update, alpha=alpha, decay=decay, step=step, parameter=parameter, offset=offset, group_size=group_size
    )
    if codes.numel() == 0:
        return
    m, n = codes.shape
    alpha, decay = (torch.as_tensor(x, dtype=torch.float32, device=codes.device) for x in (alpha, decay))
    code, add = grouped(codes.float(), group_size), grouped(alpha * update.float(), group_size)
    u = random16(offset, m * n, seed=seed, step=int(step), parameter=parameter, device=codes.device)
    u = grouped(u.reshape(m, n), group_size)

    factor = inverse(scale)[..., None]
    y = torch.where(add.isfinite(), decay * code + add * factor, code)
    size = y.abs().amax(2, keepdim=True)
    stays = (factor != 0) & (y == code).all(2, keepdim=True)
    keeps = (factor != 0) & (size <= CODES) & (size >= CODES / 2)

    old = code * scale[..., None]
    new = decay * old + add
    value = torch.where(new.isfinite(), new, old)
    largest = value.abs().amax(2)
    stays |= ~keeps & ((value == old).all(2) | ~largest.isfinite())[..., None]
    fresh = new_scale(largest)
    y = torch.where(keeps, y, value * inverse(fresh)[..., None])

    fixed = torch.where(stays, 0.0, y * 2.0**16).round().long()
    rounded = torch.where(stays, code, ((fixed >> 16) + (u < (fixed & 0xFFFF))).float())
    codes.copy_(ungrouped(rounded, n))
    scale.copy_(torch.where((stays | keeps)[..., 0], scale, fresh))


def int8_linear(x, codes, scale, bias=None, *, group_size=256):
    """y = x Wᵀ + bias (..., m) in x's type; x (..., n) and bias (m) fp32 | bf16 | fp16.

    Products and sums are fp32. Differentiable in x and bias.
    """
    if x.dtype != torch.float64:
        _ops.int8.check_int8_linear(x, codes, scale, bias, group_size=group_size)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ dequantize_int8(codes, scale, group_size=group_size).to(wide).T
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def int8_linear_backward(grad_out, codes, scale, *, group_size=256):
    """dx = dy W (..., n) in dy's type; grad_out dy (..., m)."""
    if grad_out.dtype != torch.float64:
        _ops.int8.check_int8_linear_backward(grad_out, codes, scale, group_size=group_size)
    wide = torch.promote_types(grad_out.dtype, torch.float32)
    return (grad_out.to(wide) @ dequantize_int8(codes, scale, group_size=group_size).to(wide)).to(grad_out.dtype)
