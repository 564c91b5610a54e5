"""Fused optimizer steps."""

import torch

from lowrank_sys._ops.rules import (
    ADAM,
    GUARDS,
    check_guards,
    check_lists,
    check_step_and_rate,
    define,
    expect_basis,
    expect_dtype,
    expect_float,
    expect_like,
    expect_matrix,
    fake,
    low_rank_shape,
)
from lowrank_sys._ops.workspace import (
    copy_unless_fp32,
    fp32,
    int8_operand,
    int8_panels,
    launched_together,
    reused,
    split_parts,
    tile_unless_fp32,
    workspace,
)

SCHEMAS = {
    # W <- (1 - lr*weight_decay) W - lr*scale*back(Adam(project(G)))
    # The tensor overload comes first: a 0-dim tensor given to an int argument would be accepted through .item().
    "galore_step.tensor": "(Tensor(a!) param, Tensor grad, Tensor basis, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, *, "
    f"Tensor step, Tensor lr, {ADAM}, float scale, bool left, bool int8_gemm=False) -> ()",
    "galore_step": "(Tensor(a!) param, Tensor grad, Tensor basis, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, *, "
    f"SymInt step, float lr, {ADAM}, float scale, bool left, bool int8_gemm=False) -> ()",
    "galore_step.list": "(Tensor(a!)[] params, Tensor[] grads, Tensor[] bases, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, *, "
    f"Tensor lr, {ADAM}, float scale, bool left, {GUARDS}, bool int8_gemm=False) -> ()",
    # The same, from a gradient that is already projected.
    "subspace_step.tensor": "(Tensor(a!) param, Tensor low_rank_grad, Tensor basis, Tensor(b!) exp_avg, "
    f"Tensor(c!) exp_avg_sq, *, Tensor step, Tensor lr, {ADAM}, float scale, bool left, bool int8_gemm=False) -> ()",
    "subspace_step": "(Tensor(a!) param, Tensor low_rank_grad, Tensor basis, Tensor(b!) exp_avg, "
    f"Tensor(c!) exp_avg_sq, *, SymInt step, float lr, {ADAM}, float scale, bool left, bool int8_gemm=False) -> ()",
    "subspace_step.list": "(Tensor(a!)[] params, Tensor[] low_rank_grads, Tensor[] bases, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, *, "
    f"Tensor lr, {ADAM}, float scale, bool left, {GUARDS}, bool int8_gemm=False) -> ()",
    # torch.optim.AdamW's step, element by element; an element whose gradient is not finite is skipped.
    "adamw_step": "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    f"Tensor(d!)[] steps, *, Tensor lr, {ADAM}, {GUARDS}) -> ()",
}


def check_subspace_step(param, low_rank_grad, basis, exp_avg, exp_avg_sq, *, left, op="subspace_step"):
    expect_matrix(op, "param", param)
    expect_basis(op, param, basis, left)
    shape = low_rank_shape(param, basis, left)
    for name, tensor in (("low_rank_grad", low_rank_grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if tensor is not None:
            expect_like(op, name, tensor, shape, param.device)
            expect_dtype(op, name, tensor, torch.float32)


def check_galore_step(param, grad, basis, exp_avg, exp_avg_sq, *, left, op="galore_step"):
    expect_matrix(op, "param", param)
    expect_float(op, "grad", grad)
    expect_like(op, "grad", grad, param.shape, param.device)
    check_subspace_step(param, None, basis, exp_avg, exp_avg_sq, left=left, op=op)


def check_low_rank_lists(op, check, params, grads, bases, exp_avgs, exp_avg_sqs, steps, lr, left, guards):
    """The rules of the list forms of `galore_step` and `subspace_step`; `check` is the rule of one matrix."""
    check_lists(op, params=params, grads=grads, bases=bases, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, steps=steps)
    check_guards(op, params, steps, lr, *guards)
    for tensors in zip(params, grads, bases, exp_avgs, exp_avg_sqs):
        check(*tensors, left=left, op=op)


def check_adamw_step(params, grads, exp_avgs, exp_avg_sqs, steps, lr, guards, op="adamw_step"):
    check_lists(op, params=params, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, steps=steps)
    check_guards(op, params, steps, lr, *guards)
    for i, (param, grad, exp_avg, exp_avg_sq) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs)):
        expect_float(op, f"params[{i}]", param)
        expect_float(op, f"grads[{i}]", grad)
        expect_like(op, f"params[{i}]", param, param.shape, param.device)
        expect_like(op, f"grads[{i}]", grad, param.shape, param.device)
        for name, moment in ((f"exp_avgs[{i}]", exp_avg), (f"exp_avg_sqs[{i}]", exp_avg_sq)):
            expect_like(op, name, moment, param.shape, param.device)
            expect_dtype(op, name, moment, torch.float32)


define(SCHEMAS)


def _one_matrix_fake(op, check):
    def fake(param, grad, basis, exp_avg, exp_avg_sq, *, step, lr, beta1, beta2, eps, weight_decay, scale, left, int8_gemm=False):
        check(param, grad, basis, exp_avg, exp_avg_sq, left=left, op=op)
        check_step_and_rate(op, param.device, step, lr)

    return fake


def _list_fake(op, check):
    def fake(
        params,
        grads,
        bases,
        exp_avgs,
        exp_avg_sqs,
        steps,
        *,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        scale,
        left,
        grad_scale=None,
        found_inf=None,
        skipped=None,
        int8_gemm=False,
    ):
        check_low_rank_lists(
            op, check, params, grads, bases, exp_avgs, exp_avg_sqs, steps, lr, left, (grad_scale, found_inf, skipped)
        )

    return fake


for _name, _rule in (("galore_step", check_galore_step), ("subspace_step", check_subspace_step)):
    fake(f"{_name}.tensor")(_one_matrix_fake(_name, _rule))
    fake(_name)(_one_matrix_fake(_name, _rule))
    fake(f"{_name}.list")(_list_fake(_name, _rule))


@fake("adamw_step")
def _(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    steps,
    *,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    grad_scale=None,
    found_inf=None,
    skipped=None,
):
    check_adamw_step(params, grads, exp_avgs, exp_avg_sqs, steps, lr, (grad_scale, found_inf, skipped))


@workspace(*(f"{op}{form}" for op in ("galore_step", "subspace_step") for form in ("", ".tensor", ".list")))
def _(params, gradients, bases, exp_avgs, *_, int8_gemm=False, cuda=False, **__):
    if isinstance(params, torch.Tensor):
        params, gradients, bases, exp_avgs = [params], [gradients], [bases], [exp_avgs]
    if cuda:  # the update in the basis' type, and the parts of a split product
        return max(
            (
                launched_together(*p.shape) * x.numel() * b.element_size() + split_parts(g, x.numel())
                for p, g, b, x in zip(params, gradients, bases, exp_avgs)
            ),
            default=0,
        )
    if int8_gemm:  # R or the update; the basis quantised one way, then the other; the update quantised
        shapes = [(*b.shape, x.numel() // b.shape[1]) for b, x in zip(bases, exp_avgs)]
        return (
            reused(fp32(*x.shape) for x in exp_avgs)
            + reused(size for d, r, _ in shapes for size in (int8_operand(r, d), int8_operand(d, r)))
            + reused(int8_operand(channels, r) for _, r, channels in shapes)
            + max((int8_panels(r) for _, r, _ in shapes), default=0)
        )
    # R or the update; the basis in fp32; a tile of the gradient, then of the weight
    return (
        reused(fp32(*x.shape) for x in exp_avgs)
        + reused(copy_unless_fp32(b) for b in bases)
        + reused(max(tile_unless_fp32(t) for t in pair) for pair in zip(params, gradients))
    )


@workspace("adamw_step")
def _(*_, cuda=False, **__):
    return 0
