"""INT4 bases of Q-GaLore (Zhang et al. 2024, section 3.2), with an fp32 offset where its code clamps a zero point to 4 bits.

So a group whose values all have one sign keeps half a step of precision, and two codes share a byte.
"""

import torch

from lowrank_sys import _ops
from lowrank_sys.reference.galore import back_project_, project

# The least power of two whose 15th part is a normal number.
NARROW = 2.0**-122


def quantize_int4(basis, *, group_size=256):
    """packed (r, ⌈d/2⌉) uint8, scale and offset (r, ⌈d/group_size⌉) fp32 of a basis (d, r) fp32 | bf16 | fp16.

    Per group of `group_size` (a power of two from 32 to 1024) consecutive entries of a vector: offset = min,
    scale = (max - min) / 15, code = (x - offset) * (15 / (max - min)) rounded to nearest, ties to even, so a value is off by
    half a scale at most. A group whose range is below 2⁻¹²² has scale 0 and is its minimum (a constant group is exact). A
    group that holds NaN or infinity, or whose range overflows, has codes 0 and NaN as scale and offset: all of it is NaN.
    """
    _ops.int4.check_quantize_int4(basis, group_size=group_size)
    (d, r), groups = basis.shape, _ops.int4.cdiv(basis.shape[0], group_size)
    x = basis.to(torch.float32).T
    # The last group is filled with its own last entry, which moves neither bound.
    x = torch.cat((x, x[:, -1:].expand(r, groups * group_size - d)), dim=1).reshape(r, groups, group_size)
    low, high = (x.amin(dim=2), x.amax(dim=2)) if d else (x.new_empty(r, 0), x.new_empty(r, 0))
    span = high - low
    finite, wide = span.isfinite(), span >= NARROW
    fifteen = torch.full_like(span, 15.0)
    scale = torch.where(finite, torch.where(wide, span / fifteen, 0.0), torch.nan)
    offset = torch.where(finite, low + 0.0, torch.nan)
    inverse = torch.where(finite & wide, fifteen / span, 0.0)
    codes = torch.where(inverse[..., None] > 0, ((x - offset[..., None]) * inverse[..., None]).round(), 0.0)
    codes = codes.to(torch.uint8).reshape(r, groups * group_size)
    codes[:, d:] = 0
    codes = codes[:, : d + d % 2]
    return codes[:, 0::2] | codes[:, 1::2] << 4, scale, offset


def dequantize_int4(packed, scale, offset, *, d, group_size=256):
    """The basis (d, r) fp32: offset + scale * code, the product and the sum rounded one by one."""
    _ops.int4.check_dequantize_int4(packed, scale, offset, d=d, group_size=group_size)
    codes = torch.stack((packed & 15, packed >> 4), dim=2).reshape(packed.shape[0], -1)[:, :d].to(torch.float32)
    scale, offset = (x.repeat_interleave(group_size, dim=1)[:, :d] for x in (scale, offset))
    return (offset + scale * codes).T.contiguous()


def project_int4(grad, packed, scale, offset, *, left, group_size=256):
    """R = Bᵀ G (r, n) if left, else G B (m, r); fp32. grad (m, n) fp32 | bf16 | fp16; B in INT4, see quantize_int4."""
    if grad.dtype != torch.float64:
        _ops.int4.check_project_int4(grad, packed, scale, offset, left=left, group_size=group_size)
    basis = dequantize_int4(packed, scale, offset, d=grad.shape[0 if left else 1], group_size=group_size)
    return project(grad, basis, left=left)


def back_project_int4_(param, low_rank, packed, scale, offset, *, alpha=1.0, beta=1.0, left, group_size=256):
    """W <- beta W + alpha back(X), in place. param (m, n) fp32 | bf16 | fp16; low_rank X of R's shape, fp32; B in INT4.

    beta = 0 does not read W, as in BLAS.
    """
    if param.dtype != torch.float64:
        _ops.int4.check_back_project_int4(param, low_rank, packed, scale, offset, left=left, group_size=group_size)
    basis = dequantize_int4(packed, scale, offset, d=param.shape[0 if left else 1], group_size=group_size)
    back_project_(param, low_rank, basis, alpha=alpha, beta=beta, left=left)
