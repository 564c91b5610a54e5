"""Weights in INT8, updated in place with stochastic rounding, and the linear layer on them.

A weight (m, n) is stored as codes (m, n) int8 from -127 to 127 and scale (m, ⌈n/group_size⌉) fp32: one scale for each group of
`group_size` neighbours of a row, the last of which may be short. An element's value is scale * code.
"""

import math

import torch

from lowrank_sys._ops.rules import (
    FLOATS,
    define,
    expect,
    expect_dtype,
    expect_float,
    expect_group_size,
    expect_like,
    expect_matrix,
    expect_number,
    fake,
    library,
)
from lowrank_sys._ops.workspace import FULL_CARD, TILE_ELEMENTS, TILE_SIDE, copy_unless_fp32, fp32, workspace

INT8 = "Tensor codes, Tensor scale"
STREAM = "SymInt offset=0, int group_size=256"
SCHEMAS = {
    "quantize_int8": "(Tensor weight, *, int group_size=256) -> (Tensor codes, Tensor scale)",
    "dequantize_int8": f"({INT8}, *, int group_size=256, ScalarType? dtype=None) -> Tensor",
    # W <- decay W + alpha update. The tensor overload comes first: a 0-dim tensor given to an int argument would be accepted
    # through .item().
    "int8_update_.tensor": "(Tensor(a!) codes, Tensor(b!) scale, Tensor update, *, Tensor alpha, Tensor decay, int seed, "
    f"Tensor step, int parameter, {STREAM}) -> ()",
    "int8_update_": "(Tensor(a!) codes, Tensor(b!) scale, Tensor update, *, float alpha=1.0, float decay=1.0, int seed, "
    f"SymInt step, int parameter, {STREAM}) -> ()",
    # y = x Wᵀ + bias, and dx = dy W.
    "int8_linear": f"(Tensor x, {INT8}, Tensor? bias=None, *, int group_size=256) -> Tensor",
    "int8_linear_backward": f"(Tensor grad_out, {INT8}, *, int group_size=256) -> Tensor",
}


def int8_scale_shape(shape, group_size):
    m, n = shape
    return m, (n + group_size - 1) // group_size


def expect_int8(op, codes, scale, group_size, scale_name="scale"):
    expect_group_size(op, group_size)
    expect(codes.dim() == 2, op, lambda: f"codes must be a matrix (m, n), got shape {tuple(codes.shape)}")
    expect_dtype(op, "codes", codes, torch.int8)
    expect_like(op, "codes", codes, codes.shape, codes.device)
    expect_like(op, scale_name, scale, int8_scale_shape(codes.shape, group_size), codes.device)
    expect_dtype(op, scale_name, scale, torch.float32)


def expect_stream(op, parameter, offset):
    """Where the random bits of a matrix are."""
    expect(0 <= parameter < 2**32, op, lambda: f"parameter must be from 0 to 2^32 - 1, got {parameter}")
    expect(offset >= 0, op, lambda: f"offset must be at least 0, got {offset}")


def check_int8_numbers(op, device, alpha, decay, step):
    """What W <- decay W + alpha update takes, each a number or a 0-dim tensor."""
    for name, value in (("alpha", alpha), ("decay", decay)):
        if isinstance(value, torch.Tensor):
            expect_number(op, name, value, device)
        else:
            expect(math.isfinite(value), op, lambda: f"{name} must be finite, got {value:g}")
    if isinstance(step, torch.Tensor):
        expect_number(op, "step", step, device)
    else:
        expect(0 <= step < 2**32, op, lambda: f"step must be from 0 to 2^32 - 1, got {step}")


def check_quantize_int8(weight, *, group_size, op="quantize_int8"):
    expect_matrix(op, "weight", weight)
    expect_group_size(op, group_size)


def check_dequantize_int8(codes, scale, *, group_size, dtype, op="dequantize_int8"):
    expect_int8(op, codes, scale, group_size)
    expect(dtype is None or dtype in FLOATS, op, lambda: f"dtype must be float32, bfloat16 or float16, got {dtype}")


def check_int8_update(codes, scale, update, *, alpha, decay, step, parameter, offset, group_size, op="int8_update_"):
    expect_int8(op, codes, scale, group_size)
    expect_float(op, "update", update)
    expect_like(op, "update", update, codes.shape, codes.device)
    check_int8_numbers(op, codes.device, alpha, decay, step)
    expect_stream(op, parameter, offset)


def expect_rows(op, name, rows, codes, width, axis):
    """`rows` (..., width) can be multiplied with the weight; `axis` is the weight's name for the width."""
    expect_float(op, name, rows)
    expect(
        rows.dim() >= 1 and rows.shape[-1] == width,
        op,
        lambda: f"{name} must have shape (..., {axis} = {width}), got {tuple(rows.shape)}",
    )
    expect_like(op, name, rows, rows.shape, codes.device)


def check_int8_linear(x, codes, scale, bias, *, group_size, op="int8_linear"):
    expect_int8(op, codes, scale, group_size)
    expect_rows(op, "x", x, codes, codes.shape[1], "n")
    if bias is not None:
        expect_float(op, "bias", bias)
        expect_like(op, "bias", bias, codes.shape[:1], codes.device)


def check_int8_linear_backward(grad_out, codes, scale, *, group_size, op="int8_linear_backward"):
    expect_int8(op, codes, scale, group_size)
    expect_rows(op, "grad_out", grad_out, codes, codes.shape[0], "m")


define(SCHEMAS)


@fake("quantize_int8")
def _(weight, *, group_size=256):
    check_quantize_int8(weight, group_size=group_size)
    scale = weight.new_empty(int8_scale_shape(weight.shape, group_size), dtype=torch.float32)
    return weight.new_empty(weight.shape, dtype=torch.int8), scale


@fake("dequantize_int8")
def _(codes, scale, *, group_size=256, dtype=None):
    check_dequantize_int8(codes, scale, group_size=group_size, dtype=dtype)
    return codes.new_empty(codes.shape, dtype=dtype or torch.float32)


@fake("int8_update_.tensor")
def _(codes, scale, update, *, alpha, decay, seed, step, parameter, offset=0, group_size=256):
    check_int8_update(
        codes, scale, update, alpha=alpha, decay=decay, step=step, parameter=parameter, offset=offset, group_size=group_size
    )


@fake("int8_update_")
def _(codes, scale, update, *, alpha=1.0, decay=1.0, seed, step, parameter, offset=0, group_size=256):
    check_int8_update(
        codes, scale, update, alpha=alpha, decay=decay, step=step, parameter=parameter, offset=offset, group_size=group_size
    )


@fake("int8_linear")
def _(x, codes, scale, bias=None, *, group_size=256):
    check_int8_linear(x, codes, scale, bias, group_size=group_size)
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@fake("int8_linear_backward")
def _(grad_out, codes, scale, *, group_size=256):
    check_int8_linear_backward(grad_out, codes, scale, group_size=group_size)
    return grad_out.new_empty((*grad_out.shape[:-1], codes.shape[1]))


def _save(ctx, inputs, keyword_only_inputs, output):
    _, codes, scale, bias = inputs
    ctx.save_for_backward(codes, scale)
    ctx.group_size = keyword_only_inputs["group_size"]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx, grad_out):
    codes, scale = ctx.saved_tensors
    dx = db = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.lowrank.int8_linear_backward(grad_out.contiguous(), codes, scale, group_size=ctx.group_size)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        db = grad_out.reshape(-1, codes.shape[0]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return dx, None, None, db


torch.library.register_autograd("lowrank::int8_linear", _linear_backward, setup_context=_save, lib=library)


@workspace("quantize_int8", "dequantize_int8", "int8_update_", "int8_update_.tensor")
def _(*args, cuda=False, **options):
    return 0


@workspace("int8_linear")
def _(x, codes, scale, bias=None, *, group_size=256, cuda=False):
    m, n = codes.shape
    if cuda or x.numel() == 0:
        return _parts(x, m)
    high = min(m, max(1, TILE_ELEMENTS // max(1, n)))
    return fp32(high, n) + _rows_in_fp32(x, high) + (0 if bias is None else copy_unless_fp32(bias))


@workspace("int8_linear_backward")
def _(grad_out, codes, scale, *, group_size=256, cuda=False):
    m, n = codes.shape
    if cuda or grad_out.numel() == 0:
        return _parts(grad_out, n)
    wide = min(n, max(1, TILE_ELEMENTS // max(1, m * group_size)) * group_size)
    return fp32(m, wide) + _rows_in_fp32(grad_out, wide)


def _parts(rows, outputs):
    """Most that the parts of a split product hold on a GPU: 8, and two tiles a multiprocessor, none of more than 256 x 128."""
    t = rows.numel() // max(1, rows.shape[-1])
    if 2 * -(-t // 256) * -(-outputs // 128) > FULL_CARD:
        return 0
    return min(fp32(8, t, outputs), fp32(FULL_CARD, 256, 128))


def _rows_in_fp32(rows, outputs):
    """Of at most TILE_SIDE rows that are not fp32, and of their results for `outputs` columns."""
    if rows.dtype == torch.float32:
        return 0
    width = rows.shape[-1]
    return fp32(min(rows.numel() // width, TILE_SIDE), width + outputs)
