"""Moments of a state: fp32, or codes of 8 bits with an absmax a block of 256 (Dettmers et al. 2022)."""

import torch

from lowrank_sys._ops import blockwise


def absmax_of(name):
    """The key of a coded moment's scales."""
    return f"{name}_absmax"


def is_coded(state, name):
    return absmax_of(name) in state


def is_by_row(state, name):
    """Whether a moment is in codes, in blocks by row."""
    return is_coded(state, name) and blockwise.is_by_row(state[name], state[absmax_of(name)])


def decode(state, name, signed):
    """A moment in fp32: the state's own tensor, or a copy of one in codes."""
    if is_coded(state, name):
        return torch.ops.lowrank.dequantize_blockwise(state[name], state[absmax_of(name)], signed=signed)
    return state[name]


def encode(state, name, signed, value, kept):
    """Write a moment (fp32); codes stay to the byte where `kept` (bool, 0-dim, or (rows, 1) of blocks by row), which encoding again
    could move."""
    if not is_coded(state, name):
        state[name].copy_(value)
        return
    stored = torch.ops.lowrank.quantize_blockwise(value, signed=signed, by_row=is_by_row(state, name))
    for key, made in zip((name, absmax_of(name)), stored):
        state[key].copy_(torch.where(kept, state[key], made))


def keys(state, names):
    """The keys of these moments in a state, absmaxes included."""
    return [key for name in names for key in (name, absmax_of(name)) if key in state]
