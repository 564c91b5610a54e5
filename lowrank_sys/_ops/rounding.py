"""Stochastic rounding of weights that are not fp32: what an update adds is there in the mean, however small it is.

A new value goes to the next number that the weight's dtype holds, away from zero, iff u < frac(value), u of 16 random bits, else
towards zero; a value that the dtype holds stays. fp32 weights are rounded to nearest as ever.
"""

import torch

from lowrank_sys._ops.int8 import expect_stream
from lowrank_sys._ops.rules import define, expect, expect_dtype, expect_float, expect_like, expect_number, fake
from lowrank_sys._ops.workspace import workspace

# What a step takes: the random bits of a weight are those of its number in `parameters`, from element `offsets` on.
STOCHASTIC = "bool stochastic=False, int seed=0, int[] parameters=[], int[] offsets=[]"

SCHEMAS = {
    # W <- values.
    "round_stochastic_": "(Tensor(a!) param, Tensor values, *, int seed, Tensor step, int parameter, SymInt offset=0) -> ()"
}


def check_numbers(op, count, parameters, offsets):
    """Both are one a weight; offsets may be left away."""
    for name, numbers in (("parameters", parameters), *((("offsets", offsets),) if offsets else ())):
        expect(len(numbers) == count, op, lambda: f"{name} must have {count} numbers, one a weight, got {len(numbers)}")


def check_draws(op, count, stochastic, parameters, offsets):
    """The random bits of a step of `count` weights."""
    if stochastic:
        check_numbers(op, count, parameters, offsets)
        for parameter, offset in zip(parameters, offsets or [0] * count):
            expect_stream(op, parameter, offset)


def check_round_stochastic(param, values, *, step, parameter, offset, op="round_stochastic_"):
    expect_float(op, "param", param)
    expect(param.is_contiguous(), op, lambda: f"param must be contiguous, got strides {tuple(param.stride())}")
    expect_like(op, "values", values, param.shape, param.device)
    expect_dtype(op, "values", values, torch.float32)
    expect_number(op, "step", step, param.device)
    expect_stream(op, parameter, offset)


define(SCHEMAS)


@fake("round_stochastic_")
def _(param, values, *, seed, step, parameter, offset=0):
    check_round_stochastic(param, values, step=step, parameter=parameter, offset=offset)


@workspace("round_stochastic_")
def _(*_, cuda=False, **__):
    return 0
