"""NF4 weights: four-bit codes of the quantiles of a normal distribution, with an absmax a group (Dettmers et al. 2023, QLoRA).

Codes are exact functions of fp32 inputs, whatever the precision of the other results; where bitsandbytes quantizes rows of whole
groups on the CPU, they are its codes, in its order.
"""

import torch

from lowrank_sys import _ops
from lowrank_sys._ops.nf4 import LEVELS, ZERO
from lowrank_sys.reference.int8 import grouped, inverse, new_scale, ungrouped


def levels(device):
    return torch.tensor(LEVELS, dtype=torch.float32, device=device)


def quantize_nf4(weight, *, group_size=64):
    """packed (m, ⌈n/2⌉) uint8 and absmax (m, ⌈n/group_size⌉) fp32 of a weight (m, n) fp32 | bf16 | fp16.

    A group is `group_size` (a power of two from 32 to 1024) neighbours of a row: the code is that of the level nearest to
    weight * (1 / absmax), the lower one of two that are equally near. A group of zeros, or whose absmax is denormal, is all zeros
    with absmax 0. A group that holds a NaN or an infinity has the codes of zero and absmax NaN, so that all of it is NaN.
    """
    _ops.nf4.check_quantize_nf4(weight, group_size=group_size)
    w = grouped(weight.float(), group_size)
    absmax = new_scale(w.abs().amax(2) if w.numel() else w.new_zeros(w.shape[:2]), 1.0)
    table = levels(weight.device)
    codes = torch.bucketize(w * inverse(absmax)[..., None], (table[:-1] + table[1:]) / 2, out_int32=True)
    codes = ungrouped(torch.where(absmax.isfinite()[..., None], codes, ZERO), weight.shape[1]).to(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, weight.shape[1] % 2), value=ZERO)
    return codes[:, ::2] << 4 | codes[:, 1::2], absmax


def dequantize_nf4(packed, absmax, *, n, group_size=64, dtype=None):
    """W = absmax * level of a code (m, n), in fp32 or `dtype` (fp32 | bf16 | fp16): the fp32 product, rounded to it."""
    _ops.nf4.check_dequantize_nf4(packed, absmax, n=n, group_size=group_size, dtype=dtype)
    codes = torch.stack((packed >> 4, packed & 15), 2).reshape(packed.shape[0], 2 * packed.shape[1])[:, :n]
    w = ungrouped(grouped(levels(packed.device)[codes.int()], group_size) * absmax[..., None], n)
    return w.to(dtype or torch.float32).contiguous()


def nf4_linear(x, packed, absmax, bias=None, *, group_size=64):
    """y = x Wᵀ + bias (..., m) in x's type; x (..., n) and bias (m) fp32 | bf16 | fp16.

    Products and sums are fp32. Differentiable in x and bias.
    """
    if x.dtype != torch.float64:
        _ops.nf4.check_nf4_linear(x, packed, absmax, bias, group_size=group_size)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ dequantize_nf4(packed, absmax, n=x.shape[-1], group_size=group_size).to(wide).T
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def nf4_linear_backward(grad_out, packed, absmax, *, n, group_size=64):
    """dx = dy W (..., n) in dy's type; grad_out dy (..., m)."""
    if grad_out.dtype != torch.float64:
        _ops.nf4.check_nf4_linear_backward(grad_out, packed, absmax, n=n, group_size=group_size)
    wide = torch.promote_types(grad_out.dtype, torch.float32)
    return (grad_out.to(wide) @ dequantize_nf4(packed, absmax, n=n, group_size=group_size).to(wide)).to(grad_out.dtype)
