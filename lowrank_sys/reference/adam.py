"""Adam and AdamW (Kingma and Ba 2015, Loshchilov and Hutter 2019) with the order of torch.optim.AdamW."""

import torch

from lowrank_sys import _ops
from lowrank_sys._ops.numerics import accumulator, usable
from lowrank_sys.reference.rounding import draw_of, write_


def adam_(gradient, exp_avg, exp_avg_sq, ok, *, step, beta1, beta2, eps):
    """Advance the moments in place where `ok`; return the update m̂ / (sqrt(v̂) + eps), 0 where not `ok`."""
    m = torch.where(ok, beta1 * exp_avg + (1 - beta1) * gradient, exp_avg)
    v = torch.where(ok, beta2 * exp_avg_sq + (1 - beta2) * gradient * gradient, exp_avg_sq)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    # expm1 of the exact exponent: 1 - beta**step loses half of fp32's digits at the first steps.
    step = torch.as_tensor(step, dtype=torch.float64)
    correction1 = -torch.expm1(step * torch.log(torch.tensor(beta1, dtype=torch.float64, device=step.device)))
    correction2 = -torch.expm1(step * torch.log(torch.tensor(beta2, dtype=torch.float64, device=step.device)))
    correction1, correction2 = correction1.to(m.dtype), correction2.to(m.dtype)
    return torch.where(ok, (m / correction1) / ((v / correction2).sqrt() + eps), 0)


def skip(params, found_inf):
    """Whether the whole step is a no-op. Reads `found_inf`: the oracle may synchronise, kernels do not."""
    return not params or (found_inf is not None and bool(found_inf))


def is_truth(weights, checked):
    """Whether a step computes in fp64, as tests ask for without its rules."""
    return not checked and bool(weights) and weights[0].dtype == torch.float64


def adamw_step(
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
    """torch.optim.AdamW on lists of tensors of any shape; elements whose gradient is not finite stay as they are.

    params, grads: fp32 | bf16 | fp16; exp_avgs, exp_avg_sqs: fp32 of the same shapes; steps: 0-dim fp32, advanced by one;
    lr: 0-dim. grad_scale multiplies the gradients; found_inf != 0 makes the whole step a no-op; skipped (int64) counts
    elements left out. stochastic: weights that are not fp32 are rounded as by `round_stochastic_`, with the bits of their steps,
    `parameters` and `offsets`.
    """
    draws = (stochastic, parameters, offsets)
    _ops.steps.check_adamw_step(params, grads, exp_avgs, exp_avg_sqs, steps, lr, draws, (grad_scale, found_inf, skipped))
    if skip(params, found_inf):
        return
    for i, (param, grad, exp_avg, exp_avg_sq, step) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, steps)):
        step += 1
        w, g = param.to(accumulator(param)), grad.to(accumulator(param))
        if grad_scale is not None:
            g = g * grad_scale.reshape(())
        ok = usable(g)
        update = adam_(g, exp_avg, exp_avg_sq, ok, step=step, beta1=beta1, beta2=beta2, eps=eps)
        new = torch.where(ok, (1 - lr * weight_decay) * w - lr * update, w)
        write_(param, new, step=step, **draw_of(i, stochastic, seed, parameters, offsets))
        if skipped is not None:
            skipped += (~ok).sum()
