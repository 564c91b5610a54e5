"""AdamW on parameters of any shape."""

import torch

from lowrank_sys._ops.rounding import STOCHASTIC, check_draws
from lowrank_sys._ops.rules import ADAM, GUARDS, check_guards, check_lists, define, expect_dtype, expect_float, expect_like, fake
from lowrank_sys._ops.workspace import workspace

SCHEMAS = {
    # torch.optim.AdamW's step, element by element; an element whose gradient is not finite is skipped.
    "adamw_step": "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    f"Tensor(d!)[] steps, *, Tensor lr, {ADAM}, {STOCHASTIC}, {GUARDS}) -> ()"
}


def check_adamw_step(params, grads, exp_avgs, exp_avg_sqs, steps, lr, draws, guards, op="adamw_step"):
    """draws: stochastic, parameters and offsets."""
    check_lists(op, params=params, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, steps=steps)
    check_guards(op, params, steps, lr, *guards)
    check_draws(op, len(params), *draws)
    for i, (param, grad, exp_avg, exp_avg_sq) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs)):
        expect_float(op, f"params[{i}]", param)
        expect_float(op, f"grads[{i}]", grad)
        expect_like(op, f"params[{i}]", param, param.shape, param.device)
        expect_like(op, f"grads[{i}]", grad, param.shape, param.device)
        for name, moment in ((f"exp_avgs[{i}]", exp_avg), (f"exp_avg_sqs[{i}]", exp_avg_sq)):
            expect_like(op, name, moment, param.shape, param.device)
            expect_dtype(op, name, moment, torch.float32)


define(SCHEMAS)


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
    stochastic=False,
    seed=0,
    parameters=(),
    offsets=(),
    grad_scale=None,
    found_inf=None,
    skipped=None,
):
    draws = (stochastic, parameters, offsets)
    check_adamw_step(params, grads, exp_avgs, exp_avg_sqs, steps, lr, draws, (grad_scale, found_inf, skipped))


@workspace("adamw_step")
def _(*_, cuda=False, **__):
    return 0
