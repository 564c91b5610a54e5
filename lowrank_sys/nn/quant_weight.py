"""QuantWeight: the parameter that stands for an INT8 weight."""

import copy

import torch
from torch import nn


def zero(shape, dtype, device):
    """One zero, expanded: it takes no memory."""
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


class QuantWeight(nn.Parameter):
    """A parameter that looks like a weight (out, in) in its compute dtype, whose values are INT8 codes and their scales.

    The parameter itself is a single zero, expanded, and takes no memory: what has values are `codes` and `scale`. Its `.grad`
    is the ordinary full gradient, so hooks, clipping, names and an optimizer's state are those of any weight.

    Args:
        codes: (out, in) int8.
        scale: (out, ⌈in/group_size⌉) fp32, as torch.ops.lowrank.quantize_int8 makes them.
        group_size: neighbours of a row that share a scale.
        dtype: of the weight as it looks, and of its gradient: fp32, bf16 or fp16.
        requires_grad: False for a frozen weight.
    """

    def __new__(cls, codes, scale, *, group_size=256, dtype=torch.float32, requires_grad=True):
        return cls.over({"codes": codes, "scale": scale}, group_size, dtype, requires_grad)

    @classmethod
    def over(cls, tensors, group_size, dtype, requires_grad=True):
        """A handle that reads `codes` and `scale` from the dict `tensors`: a layer's own buffers, whatever replaces them."""
        codes = tensors["codes"]
        made = super().__new__(cls, zero(codes.shape, dtype, codes.device), requires_grad)
        made.group_size = group_size
        if type(made) is cls:
            made._tensors = tensors
        else:  # a parameter made of a fake tensor stays one
            made._is_quantized = True
            made.codes, made.scale = tensors["codes"], tensors["scale"]
        return made

    @property
    def codes(self):
        return self._tensors["codes"]

    @property
    def scale(self):
        return self._tensors["scale"]

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            tensors = copy.deepcopy(self._tensors, memo)  # shared with the layer by way of the memo
            memo[id(self)] = type(self).over(tensors, self.group_size, self.dtype, self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return QuantWeight.over, (self._tensors, self.group_size, self.dtype, self.requires_grad)

    def __repr__(self):
        return f"QuantWeight({tuple(self.shape)}, group_size={self.group_size}, dtype={self.dtype}, device={self.device})"


def is_quantized(param):
    """Whether `param` is the handle of an INT8 weight."""
    return type(param) is QuantWeight or getattr(param, "_is_quantized", False)
