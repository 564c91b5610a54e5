"""Stochastic rounding of weights (Gupta et al. 2015, "Deep Learning with Limited Numerical Precision")."""

import math

import torch

from lowrank_sys import _ops
from lowrank_sys.reference.philox import random16


def _power(exponent):
    """2^exponent, exactly, in fp64."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def rounded(values, dtype, bits):
    """`values` (fp32) in bf16 or fp16: away from zero iff u < frac(value), u = bits / 2¹⁶, in units of the dtype's last place.

    The fraction has 16 bits, so an fp16 subnormal's is rounded to nearest first. Beyond the largest finite number, and for NaN, as
    to nearest: what that makes infinite is so.
    """
    info = torch.finfo(dtype)
    within = values.abs() <= info.max
    x = torch.where(within, values, 0.0).double()
    exponent = torch.frexp(x).exponent.clamp(min=round(math.log2(info.tiny)) + 1)
    place = exponent - 1 + round(math.log2(info.eps))  # of the last place, as a power of two
    fixed = (x.abs() * _power(16 - place)).round().long()
    magnitude = ((fixed >> 16) + (bits < (fixed & 0xFFFF))).double() * _power(place)
    return torch.where(within, magnitude.copysign(x).float(), values).to(dtype)


def write_(param, values, *, step, stochastic=False, seed=0, parameter=0, offset=0):
    """param <- values; stochastic: with the random bits of its elements from `offset` on, unless it is fp32 or wider."""
    if stochastic and param.itemsize == 2 and param.numel():
        bits = random16(offset, param.numel(), seed=seed, step=int(step) % 2**32, parameter=parameter, device=param.device)
        values = rounded(values, param.dtype, bits.view(param.shape))
    param.copy_(values)


def draw_of(i, stochastic, seed, parameters, offsets):
    """What `write_` takes for weight i of a step's lists."""
    parameter, offset = (parameters[i], offsets[i] if offsets else 0) if stochastic else (0, 0)
    return {"stochastic": stochastic, "seed": seed, "parameter": parameter, "offset": offset}


def round_stochastic_(param, values, *, seed, step, parameter, offset=0):
    """param <- values, rounded up in magnitude with the probability of what truncation would drop; fp32 takes them as they are.

    param: any shape, fp32 | bf16 | fp16, contiguous; values: fp32 of its shape. seed has 64 bits; step (0-dim, any number, modulo
    2³²) and parameter 32. Element i draws the bits of element offset + i of the unsharded tensor, in row-major order, as
    `int8_update_` does. A value that the dtype holds is written as it is.
    """
    _ops.rounding.check_round_stochastic(param, values, step=step, parameter=parameter, offset=offset)
    write_(param, values, stochastic=True, seed=seed, step=step, parameter=parameter, offset=offset)
