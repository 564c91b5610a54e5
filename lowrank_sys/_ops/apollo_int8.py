"""APOLLO on INT8 weights, written in place with stochastic rounding."""

import torch

from lowrank_sys._ops.int8 import expect_int8, expect_stream
from lowrank_sys._ops.qgalore import expect_numbers, or_none
from lowrank_sys._ops.residual import APOLLO, NUMBERS, check_apollo_gradient, is_key
from lowrank_sys._ops.rules import (
    ADAM,
    GUARDS,
    check_guards,
    check_lists,
    check_step_and_rate,
    define,
    expect_float,
    expect_like,
    fake,
)
from lowrank_sys._ops.workspace import copy_unless_fp32, fp32, reused, split_parts, tile_unless_fp32, workspace

_ONE = (
    "Tensor(a!) codes, Tensor(b!) weight_scale, Tensor grad, Tensor basis, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, "
    "Tensor(e!)? limiter=None"
)
_MANY = (
    "Tensor(a!)[] codes, Tensor(b!)[] weight_scales, Tensor[] grads, Tensor[] bases, Tensor(c!)[] exp_avgs, "
    "Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] limiters, Tensor(f!)[] steps"
)
# Arguments without defaults first.
_HYPER, _DEFAULTS = APOLLO.split(", bool per_tensor")
_DEFAULTS = f"bool per_tensor{_DEFAULTS}"

SCHEMAS = {
    f"apollo_int8_step{dot}": f"({_ONE}, *, {numbers}, {ADAM}, {_HYPER}, int seed, int parameter, {_DEFAULTS}, "
    "SymInt offset=0, int group_size=256) -> ()"
    for dot, numbers in NUMBERS.items()
}
SCHEMAS["apollo_int8_step.list"] = (
    f"({_MANY}, *, Tensor lr, {ADAM}, {_HYPER}, int seed, int[] parameters, {_DEFAULTS}, "
    f"int[] offsets=[], int group_size=256, {GUARDS}) -> ()"
)

OP = "apollo_int8_step"


def check_apollo_int8(codes, weight_scale, grad, basis, exp_avg, exp_avg_sq, limiter=None, *, left, parameter, offset, group_size):
    expect_int8(OP, codes, weight_scale, group_size, "weight_scale")
    expect_float(OP, "grad", grad)
    expect_like(OP, "grad", grad, codes.shape, codes.device)
    check_apollo_gradient(OP, grad, basis, exp_avg, exp_avg_sq, limiter, left)
    expect_stream(OP, parameter, offset)


def check_apollo_int8_list(
    codes, weight_scales, grads, bases, exp_avgs, exp_avg_sqs, limiters, steps, *, lr, left, parameters, offsets, group_size, guards
):
    """Returns the matrices, each a tuple with its parameter and offset at the end."""
    check_lists(
        OP,
        codes=codes,
        weight_scales=weight_scales,
        grads=grads,
        bases=bases,
        exp_avgs=exp_avgs,
        exp_avg_sqs=exp_avg_sqs,
        **({"limiters": limiters} if limiters else {}),
        steps=steps,
    )
    count = len(codes)
    expect_numbers(OP, "parameters", parameters, count)
    if offsets:
        expect_numbers(OP, "offsets", offsets, count)
    check_guards(OP, codes, steps, lr, *guards, first="codes")
    rows = list(
        zip(codes, weight_scales, grads, bases, exp_avgs, exp_avg_sqs, or_none(limiters, count), parameters, offsets or [0] * count)
    )
    for *tensors, parameter, offset in rows:
        check_apollo_int8(*tensors, left=left, parameter=parameter, offset=offset, group_size=group_size)
    return rows


define(SCHEMAS)


def _one(*tensors, step, lr, left, parameter, offset=0, group_size=256, **hyper):
    check_apollo_int8(*tensors, left=left, parameter=parameter, offset=offset, group_size=group_size)
    check_step_and_rate(OP, tensors[0].device, step, lr)


fake("apollo_int8_step.tensor")(_one)
fake("apollo_int8_step")(_one)


@fake("apollo_int8_step.list")
def _(*lists, lr, left, parameters, offsets=(), group_size=256, grad_scale=None, found_inf=None, skipped=None, **hyper):
    check_apollo_int8_list(
        *lists,
        lr=lr,
        left=left,
        parameters=parameters,
        offsets=offsets,
        group_size=group_size,
        guards=(grad_scale, found_inf, skipped),
    )


def _basis_scratch(grad, basis, exp_avg, left):
    if not is_key(basis):
        return copy_unless_fp32(basis)
    rank = exp_avg.shape[0 if left else 1]
    return fp32(min(grad.shape[0 if left else 1], max(64, (1 << 17) // rank // 64 * 64)), rank)  # csrc/ops/cpu/gaussian.cpp


@workspace(OP, f"{OP}.tensor", f"{OP}.list")
def _(codes, weight_scales, grads, bases, exp_avgs, *_, left, cuda=False, **__):
    if isinstance(codes, torch.Tensor):
        codes, grads, bases, exp_avgs = [codes], [grads], [bases], [exp_avgs]
    if cuda:  # R, five numbers a channel, and the parts of a split product
        return max(
            (fp32(*x.shape) + fp32(5, g.shape[1 if left else 0]) + split_parts(g, x.numel()) for g, x in zip(grads, exp_avgs)),
            default=0,
        )
    return (
        reused(fp32(*x.shape) for x in exp_avgs)
        + reused(tile_unless_fp32(g) for g in grads)
        + reused(_basis_scratch(g, b, x, left) for g, b, x in zip(grads, bases, exp_avgs))
    )
