"""Blockwise 8-bit codes, and steps whose moments are stored so.

A tensor of any shape is cut into blocks of 256 elements: flat, or by row, the last dimension, so that rows are stored each by
itself; the last block of the tensor, or of each row, may be short. It is stored as codes (uint8, of its shape) and absmax (fp32,
one a block; its shape says how the blocks lie); a code stands for a value of the dynamic map of bitsandbytes (Dettmers et al.
2022), signed for first moments, unsigned for second ones. Moments of low-rank gradients are stored by row, all others flat.
"""

import math

import torch

from lowrank_sys._ops.rounding import STOCHASTIC, check_draws
from lowrank_sys._ops.rules import (
    ADAM,
    GUARDS,
    check_guards,
    check_lists,
    define,
    expect,
    expect_dtype,
    expect_float,
    expect_like,
    expect_matrix,
    fake,
)
from lowrank_sys._ops.workspace import workspace

BLOCK = 256

_MOMENT_LISTS = "Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] exp_avg_absmaxes, Tensor(e!)[] exp_avg_sq_absmaxes"

SCHEMAS = {
    "quantize_blockwise": "(Tensor x, *, bool signed, bool by_row=False) -> (Tensor codes, Tensor absmax)",
    "dequantize_blockwise": "(Tensor codes, Tensor absmax, *, bool signed) -> Tensor",
    # adamw_step with 8-bit moments.
    "adam_8bit_": f"(Tensor(a!)[] params, Tensor[] grads, {_MOMENT_LISTS}, Tensor(f!)[] steps, *, Tensor lr, {ADAM}, "
    f"{STOCHASTIC}, {GUARDS}) -> ()",
    # The middle of a low-rank step: updates <- Adam(low_rank_grads), NaN in channels that are left out; steps are only read.
    "adam_8bit_low_rank_": f"(Tensor[] low_rank_grads, Tensor(a!)[] updates, {_MOMENT_LISTS}, Tensor[] steps, *, float beta1, "
    "float beta2, float eps, bool left, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()",
}


def absmax_shape(shape, by_row):
    """Shape of the absmax of a tensor: one a block."""
    *rows, columns = shape if by_row else (math.prod(shape),)
    return (*rows, -(-columns // BLOCK))


def is_by_row(codes, absmax):
    """Whether codes are in blocks by row: flat blocks have an absmax of one dimension."""
    return codes.dim() > 1 and absmax.dim() == codes.dim()


def expect_codes(op, name, codes, absmax_name, absmax, shape, device, *, by_row):
    """`codes` and `absmax` store a tensor of `shape` on `device`."""
    expect_like(op, name, codes, shape, device)
    expect_dtype(op, name, codes, torch.uint8)
    expect_like(op, absmax_name, absmax, absmax_shape(shape, by_row), device)
    expect_dtype(op, absmax_name, absmax, torch.float32)


def expect_moments(op, moments, shape, device, index=None, *, by_row=True):
    """`moments`: exp_avg, exp_avg_sq and their absmax, as entries `index` of lists if it is given; by row as those of R are."""
    first, second, first_absmax, second_absmax = moments
    names = ("exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax")
    if index is not None:
        names = [f"{name}{'es' if name.endswith('x') else 's'}[{index}]" for name in names]
    expect_codes(op, names[0], first, names[1], first_absmax, shape, device, by_row=by_row)
    expect_codes(op, names[2], second, names[3], second_absmax, shape, device, by_row=by_row)


def check_quantize_blockwise(x, by_row, *, op="quantize_blockwise"):
    expect_float(op, "x", x)
    expect_like(op, "x", x, x.shape, x.device)
    if by_row:
        expect(x.dim() > 1, op, lambda: f"x must have two or more dimensions with by_row, got shape {tuple(x.shape)}")


def check_dequantize_blockwise(codes, absmax, *, op="dequantize_blockwise"):
    expect_codes(op, "codes", codes, "absmax", absmax, codes.shape, codes.device, by_row=is_by_row(codes, absmax))


def _lists(moments):
    return dict(zip(("exp_avgs", "exp_avg_sqs", "exp_avg_absmaxes", "exp_avg_sq_absmaxes"), moments))


def check_adam_8bit(params, grads, *moments_and_steps, lr, draws, guards, op="adam_8bit_"):
    """draws: stochastic, parameters and offsets."""
    *moments, steps = moments_and_steps
    check_lists(op, params=params, grads=grads, **_lists(moments), steps=steps)
    check_guards(op, params, steps, lr, *guards)
    check_draws(op, len(params), *draws)
    for i, (param, grad, *stored) in enumerate(zip(params, grads, *moments)):
        expect_float(op, f"params[{i}]", param)
        expect_float(op, f"grads[{i}]", grad)
        expect_like(op, f"params[{i}]", param, param.shape, param.device)
        expect_like(op, f"grads[{i}]", grad, param.shape, param.device)
        expect_moments(op, stored, param.shape, param.device, i, by_row=False)


def check_adam_8bit_low_rank(low_rank_grads, updates, *moments_and_steps, guards, op="adam_8bit_low_rank_"):
    *moments, steps = moments_and_steps
    check_lists(op, low_rank_grads=low_rank_grads, updates=updates, **_lists(moments), steps=steps)
    if not low_rank_grads:
        return
    check_guards(op, low_rank_grads, steps, None, *guards, None, first="low_rank_grads")
    for i, (r, update, *stored) in enumerate(zip(low_rank_grads, updates, *moments)):
        expect_matrix(op, f"low_rank_grads[{i}]", r)
        expect_dtype(op, f"low_rank_grads[{i}]", r, torch.float32)
        expect_float(op, f"updates[{i}]", update)
        expect_like(op, f"updates[{i}]", update, r.shape, r.device)
        expect_moments(op, stored, r.shape, r.device, i)


define(SCHEMAS)


@fake("quantize_blockwise")
def _(x, *, signed, by_row=False):
    check_quantize_blockwise(x, by_row)
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(absmax_shape(x.shape, by_row), dtype=torch.float32)


@fake("dequantize_blockwise")
def _(codes, absmax, *, signed):
    check_dequantize_blockwise(codes, absmax)
    return codes.new_empty(codes.shape, dtype=torch.float32)


@fake("adam_8bit_")
def _(
    *lists, lr, beta1, beta2, eps, weight_decay, stochastic=False, seed=0, parameters=(), offsets=(), grad_scale=None,
    found_inf=None, skipped=None,
):  # fmt: skip
    check_adam_8bit(*lists, lr=lr, draws=(stochastic, parameters, offsets), guards=(grad_scale, found_inf, skipped))


@fake("adam_8bit_low_rank_")
def _(*lists, beta1, beta2, eps, left, grad_scale=None, found_inf=None):
    check_adam_8bit_low_rank(*lists, guards=(grad_scale, found_inf))


@workspace("quantize_blockwise", "dequantize_blockwise", "adam_8bit_")
def _(*_, cuda=False, **__):
    return 0


@workspace("adam_8bit_low_rank_")
def _(low_rank_grads, *_, left, cuda=False, **__):
    # A flag a channel; the CPU keeps them outside of torch's memory.
    return sum(r.shape[1 if left else 0] for r in low_rank_grads) if cuda else 0
