"""NF4 weights: codes to the bit, products within what fp32 may be off by."""

import torch

from cases.bounds import added, exact, product
from cases.case import Case, exactly
from cases.draw import FLOATS
from cases.int8 import assert_rows, flat
from lowrank_sys import reference


def quantized(draw, m, n, group_size):
    """Codes and absmax, of hostile values or of any bytes."""
    packed, absmax = reference.quantize_nf4(draw.values(m, n), group_size=group_size)
    if draw.of(False, True):
        packed = draw.values(*packed.shape, hostile=False).mul(100).to(torch.int32).to(torch.uint8)
        absmax = draw.values(*absmax.shape)
    return dict(packed=packed, absmax=absmax, group_size=group_size)


def weight(draw, n):
    return quantized(draw, draw.size(), n, draw.of(64, 32, 256, 1024))


def quantize_arguments(draw):
    return dict(weight=draw.values(draw.size(), draw.size(), dtype=draw.of(*FLOATS)), group_size=draw.of(64, 32, 256, 1024))


def dequantize_arguments(draw):
    n = draw.size()
    return weight(draw, n) | dict(n=n, dtype=draw.of(None, *FLOATS))


def linear_arguments(draw):
    n = draw.size()
    args = weight(draw, n)
    bias = draw.of(None, draw.values(len(args["packed"]), dtype=draw.of(*FLOATS)))
    return args | dict(x=draw.values(*draw.of((), (3,), (2, 2), (0,)), n, dtype=draw.of(*FLOATS)), bias=bias)


def backward_arguments(draw):
    n = draw.size()
    args = weight(draw, n)
    rows = draw.values(*draw.of((), (3,), (2, 2), (0,)), len(args["packed"]), dtype=draw.of(*FLOATS))
    return args | dict(n=n, grad_out=rows)


def dense_of(args, n):
    return exact(reference.dequantize_nf4(args["packed"], args["absmax"], n=n, group_size=args["group_size"]))


def compare_linear(before, after, result):
    w = dense_of(before, before["x"].shape[-1])
    near = product(flat(before["x"]), type(w)(w.value.T, w.error.T))
    assert_rows(result, before["x"], near if before["bias"] is None else added(near, exact(before["bias"])))


def compare_backward(before, after, result):
    assert_rows(result, before["grad_out"], product(flat(before["grad_out"]), dense_of(before, before["n"])))


CASES = {
    "quantize_nf4": Case(quantize_arguments, exactly(reference.quantize_nf4)),
    "dequantize_nf4": Case(dequantize_arguments, exactly(reference.dequantize_nf4)),
    "nf4_linear": Case(linear_arguments, compare_linear),
    "nf4_linear_backward": Case(backward_arguments, compare_backward),
}
