"""A GaLore step with 8-bit moments on the GPU: project, Adam on the codes of R, back-project with the weight update.

A block of 256 elements of R is wider than a tile of the projection, and may span channels whose other elements lie in other
tiles, so that Adam is no epilogue here: R goes through memory once, in fp32, to the CUDA C++ of `adam_8bit_low_rank_`.
"""

import torch

from lowrank_sys import _ops
from lowrank_sys.kernels.back_project import launch_back_project
from lowrank_sys.kernels.common import as_scalar, on_device_of, step_scalars
from lowrank_sys.kernels.galore import launches
from lowrank_sys.kernels.project import launch_project, new_counters


def _update(params, grads, bases, *moments_and_steps, scalars, left, beta1, beta2, eps, counters, grad_scale=None,
            found_inf=None, skipped=None):
    """Matrices of one shape: G -> R -> Adam's updates X -> W."""
    low_rank_grads = [torch.empty(_ops.low_rank_shape(grad, basis, left), dtype=torch.float32, device=grad.device)
                      for grad, basis in zip(grads, bases)]
    launch_project(grads, bases, low_rank_grads, left=left, counters=counters)
    # A 16-bit X keeps the second product on the 16-bit tensor cores.
    updates = [torch.empty_like(r, dtype=basis.dtype) for r, basis in zip(low_rank_grads, bases)]
    torch.ops.lowrank.adam_8bit_low_rank_(low_rank_grads, updates, *moments_and_steps, beta1=beta1, beta2=beta2, eps=eps,
                                          left=left, grad_scale=grad_scale, found_inf=found_inf)
    launch_back_project(params, updates, bases, scalars, left=left, step=True, skipped=skipped)


def galore_step_8bit(param, grad, basis, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax, *, step, lr, beta1, beta2,
                     eps, weight_decay, scale, left):
    """galore_step with 8-bit moments in blocks of 256, flat over R.

    param (m, n) fp32 | bf16 | fp16 and the moments are updated in place: exp_avg (signed codes) and exp_avg_sq (unsigned codes)
    uint8 of R's shape, their absmax fp32, one a block; basis (m or n, r). step counts from 1; step and lr are numbers or 0-dim
    tensors. Channels of R that are not finite keep their weights and decoded moments.
    """
    moments = (exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax)
    _ops.blockwise.check_galore_step_8bit(param, grad, basis, *moments, left=left)
    _ops.rules.check_step_and_rate("galore_step_8bit", param.device, step, lr)
    with on_device_of(param):
        step = as_scalar(step, param.device)
        scalars = step_scalars(step.reshape(1), lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, scale=scale)
        tensors = (param, grad, basis, *moments, step.to(torch.float32))
        _update(*([tensor] for tensor in tensors), scalars=scalars, left=left, beta1=beta1, beta2=beta2, eps=eps,
                counters=new_counters(param.device))


def galore_step_8bit_list(params, grads, bases, exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes, steps, *, lr,
                          beta1, beta2, eps, weight_decay, scale, left, grad_scale=None, found_inf=None, skipped=None):
    """galore_step_8bit for many matrices; steps and guards as in galore_step_list."""
    lists = (params, grads, bases, exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes, steps)
    _ops.blockwise.check_galore_step_8bit_list(*lists, lr=lr, left=left, guards=(grad_scale, found_inf, skipped))
    if not params:
        return
    with on_device_of(params[0]):
        active = None if found_inf is None else (found_inf.reshape(()) == 0).to(torch.float32)
        torch._foreach_add_(steps, 1 if active is None else active)
        order = list(launches(params, grads, bases))
        rows = step_scalars(torch.stack([steps[i] for launch in order for i in launch]).to(torch.float64), lr=lr, beta1=beta1,
                            beta2=beta2, weight_decay=weight_decay, scale=scale, grad_scale=grad_scale, active=active)
        counters = new_counters(params[0].device)
        for launch, scalars in zip(order, rows.split([len(launch) for launch in order])):
            _update(*([items[i] for i in launch] for items in lists), scalars=scalars, left=left, beta1=beta1, beta2=beta2,
                    eps=eps, counters=counters, grad_scale=grad_scale, found_inf=found_inf, skipped=skipped)
