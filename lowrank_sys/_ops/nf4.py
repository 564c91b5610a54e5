"""Weights in NF4 (Dettmers et al. 2023, QLoRA), and the linear layer on them.

A weight (m, n) is stored as packed (m, ⌈n/2⌉) uint8 and absmax (m, ⌈n/group_size⌉) fp32: one absmax for each group of `group_size`
neighbours of a row, the last of which may be short. Byte i of a row holds the code of element 2 i in its high nibble and that of
2 i + 1 in its low one, as bitsandbytes packs them; an odd row ends with the code of zero. An element's value is
absmax * LEVELS[code].
"""

import torch

from lowrank_sys._ops.int8 import int8_scale_shape
from lowrank_sys._ops.rules import (
    FLOATS,
    define,
    expect,
    expect_dtype,
    expect_float,
    expect_group_size,
    expect_like,
    expect_matrix,
    fake,
    library,
)
from lowrank_sys._ops.workspace import FORMULAS, workspace

NF4 = "Tensor packed, Tensor absmax"
SCHEMAS = {
    "quantize_nf4": "(Tensor weight, *, int group_size=64) -> (Tensor packed, Tensor absmax)",
    "dequantize_nf4": f"({NF4}, *, SymInt n, int group_size=64, ScalarType? dtype=None) -> Tensor",
    # y = x Wᵀ + bias, and dx = dy W.
    "nf4_linear": f"(Tensor x, {NF4}, Tensor? bias=None, *, int group_size=64) -> Tensor",
    "nf4_linear_backward": f"(Tensor grad_out, {NF4}, *, SymInt n, int group_size=64) -> Tensor",
}

# Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero: QLoRA's table, as bitsandbytes rounds it.
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
ZERO = LEVELS.index(0.0)


def nf4_shapes(m, n, group_size):
    """Shapes of packed and absmax of a weight (m, n)."""
    return (m, (n + 1) // 2), int8_scale_shape((m, n), group_size)


def expect_nf4(op, packed, absmax, n, group_size):
    expect_group_size(op, group_size)
    expect(packed.dim() == 2, op, lambda: f"packed must be a matrix (m, ⌈n/2⌉), got shape {tuple(packed.shape)}")
    expect_dtype(op, "packed", packed, torch.uint8)
    expect(n >= 0, op, lambda: f"n must be at least 0, got {n}")
    of_packed, of_absmax = nf4_shapes(packed.shape[0], n, group_size)
    expect_like(op, "packed", packed, of_packed, packed.device)
    expect_like(op, "absmax", absmax, of_absmax, packed.device)
    expect_dtype(op, "absmax", absmax, torch.float32)


def check_quantize_nf4(weight, *, group_size, op="quantize_nf4"):
    expect_matrix(op, "weight", weight)
    expect_group_size(op, group_size)


def check_dequantize_nf4(packed, absmax, *, n, group_size, dtype, op="dequantize_nf4"):
    expect_nf4(op, packed, absmax, n, group_size)
    expect(dtype is None or dtype in FLOATS, op, lambda: f"dtype must be float32, bfloat16 or float16, got {dtype}")


def check_nf4_linear(x, packed, absmax, bias, *, group_size, op="nf4_linear"):
    expect_float(op, "x", x)
    expect(x.dim() >= 1, op, lambda: f"x must have shape (..., n), got {tuple(x.shape)}")
    expect_nf4(op, packed, absmax, x.shape[-1], group_size)
    expect_like(op, "x", x, x.shape, packed.device)
    if bias is not None:
        expect_float(op, "bias", bias)
        expect_like(op, "bias", bias, packed.shape[:1], packed.device)


def check_nf4_linear_backward(grad_out, packed, absmax, *, n, group_size, op="nf4_linear_backward"):
    expect_nf4(op, packed, absmax, n, group_size)
    expect_float(op, "grad_out", grad_out)
    expect(
        grad_out.dim() >= 1 and grad_out.shape[-1] == packed.shape[0],
        op,
        lambda: f"grad_out must have shape (..., m = {packed.shape[0]}), got {tuple(grad_out.shape)}",
    )
    expect_like(op, "grad_out", grad_out, grad_out.shape, packed.device)


define(SCHEMAS)


@fake("quantize_nf4")
def _(weight, *, group_size=64):
    check_quantize_nf4(weight, group_size=group_size)
    of_packed, of_absmax = nf4_shapes(*weight.shape, group_size)
    return weight.new_empty(of_packed, dtype=torch.uint8), weight.new_empty(of_absmax, dtype=torch.float32)


@fake("dequantize_nf4")
def _(packed, absmax, *, n, group_size=64, dtype=None):
    check_dequantize_nf4(packed, absmax, n=n, group_size=group_size, dtype=dtype)
    return packed.new_empty((packed.shape[0], n), dtype=dtype or torch.float32)


@fake("nf4_linear")
def _(x, packed, absmax, bias=None, *, group_size=64):
    check_nf4_linear(x, packed, absmax, bias, group_size=group_size)
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@fake("nf4_linear_backward")
def _(grad_out, packed, absmax, *, n, group_size=64):
    check_nf4_linear_backward(grad_out, packed, absmax, n=n, group_size=group_size)
    return grad_out.new_empty((*grad_out.shape[:-1], n))


def _save(ctx, inputs, keyword_only_inputs, output):
    x, packed, absmax, bias = inputs
    ctx.save_for_backward(packed, absmax)
    ctx.n, ctx.group_size = x.shape[-1], keyword_only_inputs["group_size"]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx, grad_out):
    packed, absmax = ctx.saved_tensors
    dx = db = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.lowrank.nf4_linear_backward(grad_out.contiguous(), packed, absmax, n=ctx.n, group_size=ctx.group_size)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        db = grad_out.reshape(-1, packed.shape[0]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return dx, None, None, db


torch.library.register_autograd("lowrank::nf4_linear", _linear_backward, setup_context=_save, lib=library)


@workspace("quantize_nf4", "dequantize_nf4")
def _(*args, cuda=False, **options):
    return 0


# The products are those on an INT8 weight of the same shape.
@workspace("nf4_linear")
def _(x, packed, absmax, bias=None, *, group_size=64, cuda=False):
    codes = packed.new_empty((packed.shape[0], x.shape[-1]), device="meta")
    return FORMULAS["int8_linear"](x, codes, absmax, bias, group_size=group_size, cuda=cuda)


@workspace("nf4_linear_backward")
def _(grad_out, packed, absmax, *, n, group_size=64, cuda=False):
    codes = packed.new_empty((packed.shape[0], n), device="meta")
    return FORMULAS["int8_linear_backward"](grad_out, codes, absmax, group_size=group_size, cuda=cuda)
