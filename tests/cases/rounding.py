"""Stochastic rounding: to the bit, as its inputs are fp32."""

import torch

from cases.case import Case, exactly
from cases.draw import FLOATS
from lowrank_sys import reference


def stream(draw):
    return dict(
        seed=draw.integer(-(2**63), 2**63 - 1), parameter=draw.integer(0, 2**32 - 1), offset=draw.of(0, 8, 1, 5, 2**35 - 16)
    )


def rounding(draw, count):
    """How the weights of a list are rounded: the arguments that any step of several takes."""
    drawn, given = [stream(draw) for _ in range(count)], draw.of(False, True)
    stochastic = draw.of(False, True)
    return dict(
        stochastic=stochastic,
        seed=draw.integer(-(2**63), 2**63 - 1),
        parameters=[each["parameter"] for each in drawn] if stochastic or given else [],
        offsets=[each["offset"] for each in drawn] if given else [],
    )


def places(before, param):
    """By how many halves of its last place a weight of these arguments may be off."""
    return 2 if before.get("stochastic") and param.itemsize == 2 else 1


def arguments(draw):
    shape = draw.of((3,), (), (0,), (5003,), (3, 5, 7), (16, 16))
    step = torch.tensor(draw.of(1, 2, 2**40), dtype=draw.of(torch.float32, torch.float64, torch.int64))
    dtype = draw.of(*FLOATS)
    values = draw.values(*shape)
    if draw.of(False, True):  # about what fp16 has for subnormals, and about its largest
        values = (values * draw.of(2.0**-16, 65504.0)).clamp(-65536, 65536)
    return dict(param=torch.zeros(shape, dtype=dtype), values=values, step=step, **stream(draw))


CASES = {"round_stochastic_": Case(arguments, exactly(reference.round_stochastic_))}
