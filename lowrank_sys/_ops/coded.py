"""Weights in codes, INT8 or NF4: the rules, fakes, scratch and derivatives of the ops that all codings have."""

from typing import NamedTuple

import torch

from lowrank_sys._ops.rules import (
    FLOATS,
    expect,
    expect_dtype,
    expect_float,
    expect_group_size,
    expect_like,
    expect_matrix,
    fake,
    library,
)
from lowrank_sys._ops.workspace import FULL_CARD, TILE_ELEMENTS, TILE_SIDE, copy_unless_fp32, fp32, workspace


class Coding(NamedTuple):
    """How a weight (m, n) is stored: as codes, and an fp32 number for each group of neighbours of a row."""

    name: str
    codes: str  # name of the argument
    scale: str
    dtype: torch.dtype
    together: int  # codes that share an element
    group_size: int  # unless it is given

    @property
    def packed(self):
        """Whether the shape of the codes does not say what n is: ops that have nothing else to tell it by take `n`."""
        return self.together > 1

    def shapes(self, m, n, group_size):
        """Shapes of codes and scales of a weight (m, n)."""
        return (m, (n + self.together - 1) // self.together), (m, (n + group_size - 1) // group_size)


def expect_coded(coding, op, codes, scale, group_size, scale_name=None, n=None):
    """Returns n, which the codes' shape gives where it is not given."""
    width = f"⌈n/{coding.together}⌉" if coding.packed else "n"
    expect_group_size(op, group_size)
    expect(codes.dim() == 2, op, lambda: f"{coding.codes} must be a matrix (m, {width}), got shape {tuple(codes.shape)}")
    expect_dtype(op, coding.codes, codes, coding.dtype)
    n = codes.shape[1] if n is None else n
    expect(n >= 0, op, lambda: f"n must be at least 0, got {n}")
    of_codes, of_scale = coding.shapes(codes.shape[0], n, group_size)
    expect_like(op, coding.codes, codes, of_codes, codes.device)
    expect_like(op, scale_name or coding.scale, scale, of_scale, codes.device)
    expect_dtype(op, scale_name or coding.scale, scale, torch.float32)
    return n


def expect_rows(op, name, rows, codes, width, axis):
    """`rows` (..., width) can be multiplied with the weight; `axis` is the weight's name for the width."""
    expect_float(op, name, rows)
    expect(
        rows.dim() >= 1 and rows.shape[-1] == width,
        op,
        lambda: f"{name} must have shape (..., {axis} = {width}), got {tuple(rows.shape)}",
    )
    expect_like(op, name, rows, rows.shape, codes.device)


def check_quantize(coding, weight, *, group_size):
    op = f"quantize_{coding.name}"
    expect_matrix(op, "weight", weight)
    expect_group_size(op, group_size)


def check_dequantize(coding, codes, scale, *, group_size, dtype, n=None):
    op = f"dequantize_{coding.name}"
    n = expect_coded(coding, op, codes, scale, group_size, n=n)
    expect(dtype is None or dtype in FLOATS, op, lambda: f"dtype must be float32, bfloat16 or float16, got {dtype}")
    return n


def check_linear(coding, x, codes, scale, bias, *, group_size):
    op, n = f"{coding.name}_linear", None
    if coding.packed:
        expect_float(op, "x", x)
        expect(x.dim() >= 1, op, lambda: f"x must have shape (..., n), got {tuple(x.shape)}")
        n = x.shape[-1]
    n = expect_coded(coding, op, codes, scale, group_size, n=n)
    expect_rows(op, "x", x, codes, n, "n")
    if bias is not None:
        expect_float(op, "bias", bias)
        expect_like(op, "bias", bias, codes.shape[:1], codes.device)


def check_linear_backward(coding, grad_out, codes, scale, *, group_size, n=None):
    op = f"{coding.name}_linear_backward"
    n = expect_coded(coding, op, codes, scale, group_size, n=n)
    expect_rows(op, "grad_out", grad_out, codes, codes.shape[0], "m")
    return n


def register(coding):
    """Fakes, scratch and the derivative of quantize, dequantize, linear and its backward."""
    name, usual = coding.name, coding.group_size

    @fake(f"quantize_{name}")
    def _(weight, *, group_size=usual):
        check_quantize(coding, weight, group_size=group_size)
        of_codes, of_scale = coding.shapes(*weight.shape, group_size)
        return weight.new_empty(of_codes, dtype=coding.dtype), weight.new_empty(of_scale, dtype=torch.float32)

    @fake(f"dequantize_{name}")
    def _(codes, scale, *, n=None, group_size=usual, dtype=None):
        n = check_dequantize(coding, codes, scale, n=n, group_size=group_size, dtype=dtype)
        return codes.new_empty((codes.shape[0], n), dtype=dtype or torch.float32)

    @fake(f"{name}_linear")
    def _(x, codes, scale, bias=None, *, group_size=usual):
        check_linear(coding, x, codes, scale, bias, group_size=group_size)
        return x.new_empty((*x.shape[:-1], codes.shape[0]))

    @fake(f"{name}_linear_backward")
    def _(grad_out, codes, scale, *, n=None, group_size=usual):
        n = check_linear_backward(coding, grad_out, codes, scale, n=n, group_size=group_size)
        return grad_out.new_empty((*grad_out.shape[:-1], n))

    def save(ctx, inputs, keyword_only_inputs, output):
        x, codes, scale, bias = inputs
        ctx.save_for_backward(codes, scale)
        ctx.options = {"group_size": keyword_only_inputs["group_size"]} | ({"n": x.shape[-1]} if coding.packed else {})
        ctx.bias_dtype = None if bias is None else bias.dtype

    def backward(ctx, grad_out):
        codes, scale = ctx.saved_tensors
        dx = db = None
        if ctx.needs_input_grad[0]:
            dx = getattr(torch.ops.lowrank, f"{name}_linear_backward")(grad_out.contiguous(), codes, scale, **ctx.options)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
            db = grad_out.reshape(-1, codes.shape[0]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return dx, None, None, db

    torch.library.register_autograd(f"lowrank::{name}_linear", backward, setup_context=save, lib=library)

    @workspace(f"quantize_{name}", f"dequantize_{name}")
    def _(*args, cuda=False, **options):
        return 0

    @workspace(f"{name}_linear")
    def _(x, codes, scale, bias=None, *, group_size=usual, cuda=False):
        m, n = codes.shape[0], x.shape[-1]
        if cuda or x.numel() == 0:
            return _parts(x, m)
        high = min(m, max(1, TILE_ELEMENTS // max(1, n)))
        return fp32(high, n) + _rows_in_fp32(x, high) + (0 if bias is None else copy_unless_fp32(bias))

    @workspace(f"{name}_linear_backward")
    def _(grad_out, codes, scale, *, n=None, group_size=usual, cuda=False):
        m, n = codes.shape[0], codes.shape[1] if n is None else n
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
