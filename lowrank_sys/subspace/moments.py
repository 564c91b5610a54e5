"""Moments of a state: fp32, or codes of 8 bits with an absmax a block of 256 (Dettmers et al. 2022)."""

import torch


def absmax_of(name):
    """The key of a coded moment's scales."""
    return f"{name}_absmax"


def is_coded(state, name):
    return absmax_of(name) in state


def decode(state, name, signed):
    """A moment in fp32: the state's own tensor, or a copy of one in codes."""
    if is_coded(state, name):
        return torch.ops.lowrank.dequantize_blockwise(state[name], state[absmax_of(name)], signed=signed)
    return state[name]


def encode(state, name, signed, value, kept):
    """Write a moment (fp32); codes stay to the byte where `kept` (0-dim bool), which encoding again could move."""
    if not is_coded(state, name):
        state[name].copy_(value)
        return
    for key, made in zip((name, absmax_of(name)), torch.ops.lowrank.quantize_blockwise(value, signed=signed)):
        state[key].copy_(torch.where(kept, state[key], made))


def keys(state, names):
    """The keys of these moments in a state, absmaxes included."""
    return [key for name in names for key in (name, absmax_of(name)) if key in state]
