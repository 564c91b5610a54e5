"""Blockwise 8-bit codes (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"), and Adam on them."""

import math

import torch
import torch.nn.functional as F

from lowrank_sys import _ops
from lowrank_sys._ops.blockwise import BLOCK, absmax_shape, is_by_row
from lowrank_sys._ops.codebook import dynamic_map
from lowrank_sys._ops.numerics import accumulator, usable
from lowrank_sys.reference.adam import adam_, skip
from lowrank_sys.reference.rounding import draw_of, write_


def midpoints(signed, device="cpu"):
    """The 255 values between codes: fp32 means. A value equal to one gets the lower code."""
    values = dynamic_map(signed, device)
    return (values[1:] + values[:-1]) / 2


def _in_blocks(x, by_row):
    """x, flat or each row, as (blocks, 256), filled up with zeros."""
    rows = x if by_row else x.reshape(1, -1)
    return F.pad(rows, (0, -rows.shape[-1] % BLOCK)).view(-1, BLOCK)


def _from_blocks(values, shape, by_row):
    """The tensor of `shape` that _in_blocks cut."""
    rows = shape if by_row else (1, math.prod(shape))
    return values.reshape(*rows[:-1], absmax_shape(rows, True)[-1] * BLOCK)[..., : rows[-1]].reshape(shape).contiguous()


def _encode(x, signed, by_row):
    """(codes of x's shape, absmax) of fp32 x of any shape."""
    values = _in_blocks(x, by_row)
    most = values.abs().amax(dim=1) if values.numel() else values.new_empty(0)
    finite, normal = most.isfinite(), most >= torch.finfo(torch.float32).tiny
    absmax = torch.where(finite, torch.where(normal, most, 0), torch.nan)
    inverse = 1 / most
    y = torch.where((finite & normal)[:, None], values * inverse[:, None], 0)
    codes = torch.bucketize(y, midpoints(signed, x.device)).to(torch.uint8)
    return _from_blocks(codes, x.shape, by_row), absmax.view(absmax_shape(x.shape, by_row))


def _decode(codes, absmax, signed):
    by_row = is_by_row(codes, absmax)
    values = dynamic_map(signed, codes.device)[_in_blocks(codes, by_row).long()] * absmax.reshape(-1, 1)
    return _from_blocks(values, codes.shape, by_row)


def quantize_blockwise(x, *, signed, by_row=False):
    """(codes, absmax): 8-bit codes (uint8, x's shape) and the largest |x| of each block of 256 (fp32, flat).

    x: any shape, fp32 | bf16 | fp16. by_row: blocks begin anew at each row, the last dimension of two or more, and absmax has shape
    (..., ⌈columns/256⌉). The code is that of the map's value nearest to x * (1 / absmax), which is rounded once; of
    two equally near, the lower. A block of zeros or denormals stores zeros: codes of 0, absmax 0. A block with a NaN or an
    infinity decodes to NaN: codes of 0, absmax NaN. Negative values of an unsigned x become 0.
    """
    _ops.blockwise.check_quantize_blockwise(x, by_row)
    return _encode(x.to(torch.float32), signed, by_row)


def dequantize_blockwise(codes, absmax, *, signed):
    """map[codes] * absmax, fp32, of the codes' shape. codes: uint8; absmax: fp32, one a block, flat or by row."""
    _ops.blockwise.check_dequantize_blockwise(codes, absmax)
    return _decode(codes, absmax, signed)


class Moments:
    """Both moments of a tensor, decoded for a step and encoded again."""

    def __init__(self, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax, dtype):
        self.stored = ((exp_avg, exp_avg_absmax, True), (exp_avg_sq, exp_avg_sq_absmax, False))
        self.values = [_decode(*stored).to(dtype) for stored in self.stored]

    def adam(self, gradient, ok, **hyper):
        """Advance where ok; blocks of which nothing is ok keep their bytes. Returns the update, 0 where not ok."""
        update = adam_(gradient, *self.values, ok, **hyper)
        for values, (codes, absmax, signed) in zip(self.values, self.stored):
            by_row = is_by_row(codes, absmax)
            touched = _in_blocks(ok.expand(gradient.shape), by_row).any(dim=1)
            new_codes, new_absmax = _encode(values.to(torch.float32), signed, by_row)
            absmax.copy_(torch.where(touched.view(absmax.shape), new_absmax, absmax))
            codes.copy_(torch.where(_from_blocks(touched[:, None].expand(-1, BLOCK), codes.shape, by_row), new_codes, codes))
        return update


def adam_8bit_(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    exp_avg_absmaxes,
    exp_avg_sq_absmaxes,
    steps,
    *,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    stochastic=False,
    seed=0,
    parameters=(),
    offsets=(),
    grad_scale=None,
    found_inf=None,
    skipped=None,
):
    """adamw_step with 8-bit moments: AdamW on tensors of any shape, moments in blocks of 256.

    params, grads: fp32 | bf16 | fp16; exp_avgs (signed codes), exp_avg_sqs (unsigned codes): uint8 of their shapes, with
    absmaxes (fp32, one a block); steps, lr, the guards and the rounding as in adamw_step. The update comes from the moments before
    they are rounded to codes. An element whose gradient is not finite keeps its weight, and its decoded moments as its block is
    encoded again; a block of such elements only keeps its bytes.
    """
    moments = (exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes)
    draws = (stochastic, parameters, offsets)
    _ops.blockwise.check_adam_8bit(params, grads, *moments, steps, lr=lr, draws=draws, guards=(grad_scale, found_inf, skipped))
    if skip(params, found_inf):
        return
    grad_scale = None if grad_scale is None else grad_scale.reshape(())
    for i, (param, grad, *stored, step) in enumerate(zip(params, grads, *moments, steps)):
        step += 1
        left_out = adamw(
            param,
            grad,
            Moments(*stored, torch.float32),
            step=step,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            grad_scale=grad_scale,
            **draw_of(i, stochastic, seed, parameters, offsets),
        )
        if skipped is not None:
            skipped += left_out


def adamw(param, grad, moments, *, step, lr, beta1, beta2, eps, weight_decay, grad_scale=None, **draw):
    """One tensor of adam_8bit_; returns how many elements were left out."""
    w, g = param.to(accumulator(param)), grad.to(accumulator(param))
    if grad_scale is not None:
        g = g * grad_scale
    ok = usable(g)
    update = moments.adam(g, ok, step=step, beta1=beta1, beta2=beta2, eps=eps)
    write_(param, torch.where(ok, (1 - lr * weight_decay) * w - lr * update, w), step=step, **draw)
    return (~ok).sum()


def adam_8bit_low_rank_(
    low_rank_grads,
    updates,
    exp_avgs,
    exp_avg_sqs,
    exp_avg_absmaxes,
    exp_avg_sq_absmaxes,
    steps,
    *,
    beta1,
    beta2,
    eps,
    left,
    grad_scale=None,
    found_inf=None,
):
    """updates <- Adam(low_rank_grads), advancing 8-bit moments: what a low-rank step does between its two products.

    low_rank_grads: R (r, n) if left, else (m, r), fp32; updates: of the same shapes, fp32 | bf16 | fp16; moments in blocks by row
    of R. steps (0-dim fp32) count from 1 and are only read. A channel (column of R if left, else row) that is not usable is NaN in
    its update and keeps its decoded moments as their blocks, which span columns, are encoded again; a block of such elements only,
    as all of a row's are, keeps its bytes. found_inf != 0: nothing is written.
    """
    moments = (exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes)
    _ops.blockwise.check_adam_8bit_low_rank(low_rank_grads, updates, *moments, steps, guards=(grad_scale, found_inf))
    if skip(low_rank_grads, found_inf):
        return
    for r, update, *stored, step in zip(low_rank_grads, updates, *moments, steps):
        r = r if grad_scale is None else r * grad_scale
        ok = usable(r).all(dim=0 if left else 1, keepdim=True)
        x = Moments(*stored, torch.float32).adam(r, ok, step=step, beta1=beta1, beta2=beta2, eps=eps)
        update.copy_(torch.where(ok, x, torch.nan))
