"""Blockwise 8-bit codes, and steps whose moments are stored so.

A tensor of any shape is cut, flat, into blocks of 256 elements (the last may be short). It is stored as codes (uint8, of its
shape) and absmax (fp32, one a block); a code stands for a value of the dynamic map of bitsandbytes (Dettmers et al. 2022),
signed for first moments, unsigned for second ones.
"""

import math

import torch

from lowrank_sys._ops.int4 import expect_int4, int4_low_rank_shape
from lowrank_sys._ops.rules import (
    ADAM,
    GUARDS,
    check_guards,
    check_lists,
    check_step_and_rate,
    define,
    expect_basis,
    expect_dtype,
    expect_float,
    expect_like,
    expect_matrix,
    fake,
    low_rank_shape,
)
from lowrank_sys._ops.workspace import copy_unless_fp32, fp32, launched_together, reused, split_parts, tile_unless_fp32, workspace

BLOCK = 256

_MOMENTS = "Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) exp_avg_absmax, Tensor(e!) exp_avg_sq_absmax"
_MOMENT_LISTS = "Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] exp_avg_absmaxes, Tensor(e!)[] exp_avg_sq_absmaxes"
_INT4_LISTS = "Tensor[] bases, Tensor[] basis_scales, Tensor[] basis_offsets"

SCHEMAS = {
    "quantize_blockwise": "(Tensor x, *, bool signed) -> (Tensor codes, Tensor absmax)",
    "dequantize_blockwise": "(Tensor codes, Tensor absmax, *, bool signed) -> Tensor",
    # adamw_step with 8-bit moments.
    "adam_8bit_": f"(Tensor(a!)[] params, Tensor[] grads, {_MOMENT_LISTS}, Tensor(f!)[] steps, *, Tensor lr, {ADAM}, {GUARDS}) "
    "-> ()",
    # The middle of a low-rank step: updates <- Adam(low_rank_grads), NaN in channels that are left out; steps are only read.
    "adam_8bit_low_rank_": f"(Tensor[] low_rank_grads, Tensor(a!)[] updates, {_MOMENT_LISTS}, Tensor[] steps, *, float beta1, "
    "float beta2, float eps, bool left, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()",
    # galore_step with 8-bit moments, flat over R.
    "galore_step_8bit.tensor": f"(Tensor(a!) param, Tensor grad, Tensor basis, {_MOMENTS}, *, Tensor step, Tensor lr, {ADAM}, "
    "float scale, bool left) -> ()",
    "galore_step_8bit": f"(Tensor(a!) param, Tensor grad, Tensor basis, {_MOMENTS}, *, SymInt step, float lr, {ADAM}, "
    "float scale, bool left) -> ()",
    "galore_step_8bit.list": f"(Tensor(a!)[] params, Tensor[] grads, Tensor[] bases, {_MOMENT_LISTS}, Tensor(f!)[] steps, *, "
    f"Tensor lr, {ADAM}, float scale, bool left, {GUARDS}) -> ()",
    # The same on bases in INT4.
    "galore_step_8bit.int4": f"(Tensor(a!)[] params, Tensor[] grads, {_INT4_LISTS}, {_MOMENT_LISTS}, Tensor(f!)[] steps, *, "
    f"Tensor lr, {ADAM}, float scale, bool left, int group_size=256, {GUARDS}) -> ()",
    # Both from gradients that are already projected.
    "subspace_step_8bit.list": f"(Tensor(a!)[] params, Tensor[] low_rank_grads, Tensor[] bases, {_MOMENT_LISTS}, "
    f"Tensor(f!)[] steps, *, Tensor lr, {ADAM}, float scale, bool left, {GUARDS}) -> ()",
    "subspace_step_8bit.int4": f"(Tensor(a!)[] params, Tensor[] low_rank_grads, {_INT4_LISTS}, {_MOMENT_LISTS}, "
    f"Tensor(f!)[] steps, *, Tensor lr, {ADAM}, float scale, bool left, int group_size=256, {GUARDS}) -> ()",
}


def blocks(shape):
    """Number of blocks of a tensor."""
    return -(-math.prod(shape) // BLOCK)


def expect_codes(op, name, codes, absmax_name, absmax, shape, device):
    """`codes` and `absmax` store a tensor of `shape` on `device`."""
    expect_like(op, name, codes, shape, device)
    expect_dtype(op, name, codes, torch.uint8)
    expect_like(op, absmax_name, absmax, (blocks(shape),), device)
    expect_dtype(op, absmax_name, absmax, torch.float32)


def expect_moments(op, moments, shape, device, index=None):
    """`moments`: exp_avg, exp_avg_sq and their absmax, as entries `index` of lists if it is given."""
    first, second, first_absmax, second_absmax = moments
    names = ("exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax")
    if index is not None:
        names = [f"{name}{'es' if name.endswith('x') else 's'}[{index}]" for name in names]
    expect_codes(op, names[0], first, names[1], first_absmax, shape, device)
    expect_codes(op, names[2], second, names[3], second_absmax, shape, device)


def check_quantize_blockwise(x, *, op="quantize_blockwise"):
    expect_float(op, "x", x)
    expect_like(op, "x", x, x.shape, x.device)


def check_dequantize_blockwise(codes, absmax, *, op="dequantize_blockwise"):
    expect_codes(op, "codes", codes, "absmax", absmax, codes.shape, codes.device)


def _lists(moments):
    return dict(zip(("exp_avgs", "exp_avg_sqs", "exp_avg_absmaxes", "exp_avg_sq_absmaxes"), moments))


def check_adam_8bit(params, grads, *moments_and_steps, lr, guards, op="adam_8bit_"):
    *moments, steps = moments_and_steps
    check_lists(op, params=params, grads=grads, **_lists(moments), steps=steps)
    check_guards(op, params, steps, lr, *guards)
    for i, (param, grad, *stored) in enumerate(zip(params, grads, *moments)):
        expect_float(op, f"params[{i}]", param)
        expect_float(op, f"grads[{i}]", grad)
        expect_like(op, f"params[{i}]", param, param.shape, param.device)
        expect_like(op, f"grads[{i}]", grad, param.shape, param.device)
        expect_moments(op, stored, param.shape, param.device, i)


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


def check_low_rank_step_8bit(op, param, gradient, basis, moments, *, projected, left, group_size=None):
    """One matrix. gradient: R if `projected`, else G; basis: (basis,), or with a group_size its parts in INT4."""
    expect_matrix(op, "param", param)
    if group_size is None:
        expect_basis(op, param, *basis, left)
        shape = low_rank_shape(param, *basis, left)
    else:
        expect_int4(op, *basis, param.shape[0 if left else 1], group_size, param.device, names=INT4_NAMES)
        shape = int4_low_rank_shape(param, basis[0], left)
    if projected:
        expect_like(op, "low_rank_grad", gradient, shape, param.device)
        expect_dtype(op, "low_rank_grad", gradient, torch.float32)
    else:
        expect_float(op, "grad", gradient)
        expect_like(op, "grad", gradient, param.shape, param.device)
    expect_moments(op, moments, shape, param.device)


def check_galore_step_8bit(param, grad, basis, *moments, left):
    check_low_rank_step_8bit("galore_step_8bit", param, grad, (basis,), moments, projected=False, left=left)


# What a list form calls the parts of a basis in INT4.
INT4_NAMES = ("basis", "basis_scale", "basis_offset")


def split_lists(lists, group_size):
    """params, gradients, the lists of a basis (one, or three in INT4), those of the moments, and steps."""
    parts = 1 if group_size is None else 3
    params, gradients, *rest = lists
    return params, gradients, rest[:parts], rest[parts:-1], rest[-1]


def check_low_rank_lists_8bit(op, *lists, projected, lr, left, guards, group_size=None):
    """The rules of the list forms of galore_step_8bit, and of subspace_step_8bit (`projected`)."""
    params, gradients, bases, moments, steps = split_lists(lists, group_size)
    name = "low_rank_grads" if projected else "grads"
    check_lists(
        op,
        params=params,
        **{name: gradients},
        **dict(zip(("bases", "basis_scales", "basis_offsets"), bases)),
        **_lists(moments),
        steps=steps,
    )
    check_guards(op, params, steps, lr, *guards)
    for param, gradient, *basis_and_moments in zip(params, gradients, *bases, *moments):
        check_low_rank_step_8bit(
            op,
            param,
            gradient,
            basis_and_moments[:-4],
            basis_and_moments[-4:],
            projected=projected,
            left=left,
            group_size=group_size,
        )


define(SCHEMAS)


@fake("quantize_blockwise")
def _(x, *, signed):
    check_quantize_blockwise(x)
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty((blocks(x.shape),), dtype=torch.float32)


@fake("dequantize_blockwise")
def _(codes, absmax, *, signed):
    check_dequantize_blockwise(codes, absmax)
    return codes.new_empty(codes.shape, dtype=torch.float32)


@fake("adam_8bit_")
def _(*lists, lr, beta1, beta2, eps, weight_decay, grad_scale=None, found_inf=None, skipped=None):
    check_adam_8bit(*lists, lr=lr, guards=(grad_scale, found_inf, skipped))


@fake("adam_8bit_low_rank_")
def _(*lists, beta1, beta2, eps, left, grad_scale=None, found_inf=None):
    check_adam_8bit_low_rank(*lists, guards=(grad_scale, found_inf))


def _galore_step_8bit(param, *tensors, step, lr, beta1, beta2, eps, weight_decay, scale, left):
    check_galore_step_8bit(param, *tensors, left=left)
    check_step_and_rate("galore_step_8bit", param.device, step, lr)


fake("galore_step_8bit.tensor")(_galore_step_8bit)
fake("galore_step_8bit")(_galore_step_8bit)


def _low_rank_list_fake(op, projected, int4):
    def fake(
        *lists, lr, beta1, beta2, eps, weight_decay, scale, left, group_size=256, grad_scale=None, found_inf=None, skipped=None
    ):
        check_low_rank_lists_8bit(
            op,
            *lists,
            projected=projected,
            lr=lr,
            left=left,
            guards=(grad_scale, found_inf, skipped),
            group_size=group_size if int4 else None,
        )

    return fake


for _op, _projected in (("galore_step_8bit", False), ("subspace_step_8bit", True)):
    fake(f"{_op}.list")(_low_rank_list_fake(_op, _projected, False))
    fake(f"{_op}.int4")(_low_rank_list_fake(_op, _projected, True))


@workspace("quantize_blockwise", "dequantize_blockwise", "adam_8bit_")
def _(*_, cuda=False, **__):
    return 0


@workspace("adam_8bit_low_rank_")
def _(low_rank_grads, *_, left, cuda=False, **__):
    # A flag a channel; the CPU keeps them outside of torch's memory.
    return sum(r.shape[1 if left else 0] for r in low_rank_grads) if cuda else 0


@workspace("galore_step_8bit", "galore_step_8bit.tensor", "galore_step_8bit.list", "subspace_step_8bit.list")
def _(params, gradients, bases, exp_avgs, *_, cuda=False, **__):
    if isinstance(params, torch.Tensor):
        params, gradients, bases, exp_avgs = [params], [gradients], [bases], [exp_avgs]
    if cuda:  # R in fp32, the update in the basis' type, and the parts of a split product
        return max(
            (
                launched_together(*p.shape) * x.numel() * (4 + b.element_size()) + split_parts(g, x.numel())
                for p, g, b, x in zip(params, gradients, bases, exp_avgs)
            ),
            default=0,
        )
    # R or the update; the basis in fp32; a tile of the gradient, then of the weight
    return (
        reused(fp32(*x.shape) for x in exp_avgs)
        + reused(copy_unless_fp32(b) for b in bases)
        + reused(max(map(tile_unless_fp32, pair)) for pair in zip(params, gradients))
    )


@workspace("galore_step_8bit.int4", "subspace_step_8bit.int4")
def _(params, gradients, bases, scales, offsets, exp_avgs, *_, cuda=False, **__):
    if cuda:  # R and the update in fp32, and the parts of a split product
        return max(
            (
                launched_together(*p.shape) * 8 * x.numel() + split_parts(g, x.numel())
                for p, g, x in zip(params, gradients, exp_avgs)
            ),
            default=0,
        )
    # R or the update; unpacked panels of the basis, 256 KiB a thread; a tile of the gradient, then of the weight
    panel = max((min(fp32(*b.shape) * 2, torch.get_num_threads() * (256 << 10)) for b in bases), default=0)
    return (
        reused(fp32(*x.shape) for x in exp_avgs)
        + panel
        + reused(max(map(tile_unless_fp32, pair)) for pair in zip(params, gradients))
    )
