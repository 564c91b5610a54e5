"""How a quantized weight is kept: INT8 codes or NF4 levels, with a scale for each group of neighbours in a row."""

import torch

from lowrank_sys._ops import coded
from lowrank_sys._ops.int8 import INT8
from lowrank_sys._ops.nf4 import NF4


class Coding(coded.Coding):
    """The ops of a coding, with one signature. n: columns of the weight, for codes that do not say it."""

    __slots__ = ()

    @property
    def method(self):
        """What a Hugging Face configuration calls it."""
        return f"lowrank_{self.name}"

    def encode(self, weight, group_size):
        """(codes, scale) of a weight (m, n)."""
        return self._op("quantize_{}")(weight, group_size=group_size)

    def decode(self, codes, scale, n, group_size, dtype):
        """The values (m, n), in `dtype`."""
        return self._op("dequantize_{}")(codes, scale, group_size=group_size, dtype=dtype, **self._width(n))

    def linear(self, x, codes, scale, bias, group_size):
        return self._op("{}_linear")(x, codes, scale, bias, group_size=group_size)

    def linear_backward(self, grad_out, codes, scale, n, group_size):
        return self._op("{}_linear_backward")(grad_out, codes, scale, group_size=group_size, **self._width(n))

    def _op(self, pattern):
        return getattr(torch.ops.lowrank, pattern.format(self.name))

    def _width(self, n):
        return {"n": n} if self.packed else {}


Int8, Nf4 = Coding(*INT8), Coding(*NF4)
CODINGS = {coding.name: coding for coding in (Int8, Nf4)}


def coding_of(weights):
    """The coding of this name; ValueError for another."""
    if weights not in CODINGS:
        raise ValueError(f"weights must be one of {', '.join(CODINGS)}, got {weights!r}")
    return CODINGS[weights]


def of_method(method):
    """The coding that a Hugging Face configuration calls so, or None."""
    return next((coding for coding in CODINGS.values() if coding.method == method), None)
