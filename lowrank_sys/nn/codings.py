"""How a quantized weight is kept: INT8 codes or NF4 levels, with a scale for each group of neighbours in a row.

A coding is a class that is never instantiated: copies and pickles of what has one keep it.
"""

import torch

from lowrank_sys._ops.int8 import int8_scale_shape
from lowrank_sys._ops.nf4 import NF4

ops = torch.ops.lowrank


class Int8:
    """codes (m, n) int8 and scale (m, ⌈n/group_size⌉) fp32: lowrank_sys._ops.int8."""

    name = "int8"
    method = "lowrank_int8"  # what a Hugging Face configuration calls it
    dtype, group_size = torch.int8, 256  # of the codes, and the usual one

    @staticmethod
    def shapes(m, n, group_size):
        """Of codes and scale."""
        return (m, n), int8_scale_shape((m, n), group_size)

    @staticmethod
    def encode(weight, group_size):
        return ops.quantize_int8(weight, group_size=group_size)

    @staticmethod
    def decode(codes, scale, n, group_size, dtype):
        """The values (m, n), in `dtype`."""
        return ops.dequantize_int8(codes, scale, group_size=group_size, dtype=dtype)

    @staticmethod
    def linear(x, codes, scale, bias, group_size):
        return ops.int8_linear(x, codes, scale, bias, group_size=group_size)

    @staticmethod
    def linear_backward(grad_out, codes, scale, n, group_size):
        return ops.int8_linear_backward(grad_out, codes, scale, group_size=group_size)


class Nf4:
    """codes (m, ⌈n/2⌉) uint8, two levels a byte, and scale (m, ⌈n/group_size⌉) fp32: lowrank_sys._ops.nf4."""

    name = "nf4"
    method = "lowrank_nf4"
    dtype, group_size = torch.uint8, 64

    @staticmethod
    def shapes(m, n, group_size):
        return NF4.shapes(m, n, group_size)

    @staticmethod
    def encode(weight, group_size):
        return ops.quantize_nf4(weight, group_size=group_size)

    @staticmethod
    def decode(codes, scale, n, group_size, dtype):
        return ops.dequantize_nf4(codes, scale, n=n, group_size=group_size, dtype=dtype)

    @staticmethod
    def linear(x, codes, scale, bias, group_size):
        return ops.nf4_linear(x, codes, scale, bias, group_size=group_size)

    @staticmethod
    def linear_backward(grad_out, codes, scale, n, group_size):
        return ops.nf4_linear_backward(grad_out, codes, scale, n=n, group_size=group_size)


CODINGS = {coding.name: coding for coding in (Int8, Nf4)}


def coding_of(weights):
    """The coding of this name; ValueError for another."""
    if weights not in CODINGS:
        raise ValueError(f"weights must be one of {', '.join(CODINGS)}, got {weights!r}")
    return CODINGS[weights]


def of_method(method):
    """The coding that a Hugging Face configuration calls so, or None."""
    return next((coding for coding in CODINGS.values() if coding.method == method), None)
