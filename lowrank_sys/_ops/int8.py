"""Weights in INT8, updated in place with stochastic rounding, and the linear layer on them.

A weight (m, n) is stored as codes (m, n) int8 from -127 to 127 and scale (m, ⌈n/group_size⌉) fp32: one scale for each group of
`group_size` neighbours of a row, the last of which may be short. An element's value is scale * code.
"""

import functools
import math

import torch

from lowrank_sys._ops import coded
from lowrank_sys._ops.rules import define, expect, expect_float, expect_like, expect_number, fake
from lowrank_sys._ops.workspace import workspace

PAIR = "Tensor codes, Tensor scale"
STREAM = "SymInt offset=0, int group_size=256"
SCHEMAS = {
    "quantize_int8": "(Tensor weight, *, int group_size=256) -> (Tensor codes, Tensor scale)",
    "dequantize_int8": f"({PAIR}, *, int group_size=256, ScalarType? dtype=None) -> Tensor",
    # W <- decay W + alpha update. The tensor overload comes first: a 0-dim tensor given to an int argument would be accepted
    # through .item().
    "int8_update_.tensor": "(Tensor(a!) codes, Tensor(b!) scale, Tensor update, *, Tensor alpha, Tensor decay, int seed, "
    f"Tensor step, int parameter, {STREAM}) -> ()",
    "int8_update_": "(Tensor(a!) codes, Tensor(b!) scale, Tensor update, *, float alpha=1.0, float decay=1.0, int seed, "
    f"SymInt step, int parameter, {STREAM}) -> ()",
    # y = x Wᵀ + bias, and dx = dy W.
    "int8_linear": f"(Tensor x, {PAIR}, Tensor? bias=None, *, int group_size=256) -> Tensor",
    "int8_linear_backward": f"(Tensor grad_out, {PAIR}, *, int group_size=256) -> Tensor",
}


INT8 = coded.Coding("int8", "codes", "scale", torch.int8, together=1, group_size=256)
expect_int8 = functools.partial(coded.expect_coded, INT8)
check_quantize_int8 = functools.partial(coded.check_quantize, INT8)
check_dequantize_int8 = functools.partial(coded.check_dequantize, INT8)
check_int8_linear = functools.partial(coded.check_linear, INT8)
check_int8_linear_backward = functools.partial(coded.check_linear_backward, INT8)


def int8_scale_shape(shape, group_size):
    return INT8.shapes(*shape, group_size)[1]


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


def check_int8_update(codes, scale, update, *, alpha, decay, step, parameter, offset, group_size, op="int8_update_"):
    expect_int8(op, codes, scale, group_size)
    expect_float(op, "update", update)
    expect_like(op, "update", update, codes.shape, codes.device)
    check_int8_numbers(op, codes.device, alpha, decay, step)
    expect_stream(op, parameter, offset)


define(SCHEMAS)
coded.register(INT8)


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


@workspace("int8_update_", "int8_update_.tensor")
def _(*args, cuda=False, **options):
    return 0
