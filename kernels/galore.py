"""A GaLore step on the GPU: project with Adam as the epilogue, then back-project with the weight update as the epilogue."""

import torch

from lowrank_sys import _ops
from lowrank_sys.kernels import configs
from lowrank_sys.kernels.adam import launch_adam
from lowrank_sys.kernels.back_project import launch_back_project
from lowrank_sys.kernels.basis import rank
from lowrank_sys.kernels.common import on_device_of
from lowrank_sys.kernels.int8_gemm import launch_back_project_int8, launch_project_int8
from lowrank_sys.kernels.project import counters_of, launch_project
from lowrank_sys.kernels.scalars import advance, one_row


def _update(
    params,
    gradients,
    bases,
    exp_avgs,
    exp_avg_sqs,
    scalars,
    *,
    projected,
    left,
    beta1,
    beta2,
    eps,
    counters,
    skipped=None,
    int8_gemm=False,
):
    """Matrices of one shape: gradients (the full ones, or R if `projected`) -> Adam's updates X -> W."""
    if int8_gemm:
        rows = scalars.reshape(len(params), -1)
        for matrix in zip(params, gradients, bases, exp_avgs, exp_avg_sqs, rows):
            _update_in_int8(
                *matrix, projected=projected, left=left, beta1=beta1, beta2=beta2, eps=eps, counters=counters, skipped=skipped
            )
        return
    # A 16-bit X keeps the second product on the 16-bit tensor cores.
    updates = [torch.empty_like(exp_avg, dtype=basis.dtype) for exp_avg, basis in zip(exp_avgs, bases)]
    adam = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "scalars": scalars, "beta1": beta1, "beta2": beta2, "eps": eps}
    if projected:
        launch_adam(gradients, updates, left=left, **adam)
    else:
        launch_project(gradients, bases, updates, left=left, counters=counters, **adam)
    launch_back_project(params, updates, bases, scalars, left=left, step=True, skipped=skipped)


def _update_in_int8(param, gradient, basis, exp_avg, exp_avg_sq, scalars, *, projected, left, beta1, beta2, eps, counters, skipped):
    """One matrix; X stays in fp32, so that its codes are the oracle's."""
    update = torch.empty_like(exp_avg)
    adam = {"beta1": beta1, "beta2": beta2, "eps": eps}
    if projected:
        launch_adam([gradient], [update], left=left, exp_avgs=[exp_avg], exp_avg_sqs=[exp_avg_sq], scalars=scalars, **adam)
    else:
        launch_project_int8(
            gradient, basis, update, left=left, counters=counters, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, scalars=scalars, **adam
        )
    launch_back_project_int8(param, update, basis, scalars, left=left, step=True, skipped=skipped)


def _step(param, gradient, basis, exp_avg, exp_avg_sq, *, projected, step, lr, weight_decay, scale, beta1, beta2, **rest):
    with on_device_of(param):
        scalars, _ = one_row(step, param.device, lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, scale=scale)
        _update(
            [param],
            [gradient],
            [basis],
            [exp_avg],
            [exp_avg_sq],
            scalars,
            projected=projected,
            beta1=beta1,
            beta2=beta2,
            counters=None if projected else counters_of(param.device),
            **rest,
        )


def launches(params, gradients, bases):
    """Lists of indices of matrices that share a launch: one shape and set of dtypes, 8, 4, 2 or 1 of them."""
    alike = {}
    for i, (param, *operands) in enumerate(zip(params, gradients, bases)):
        key = (*param.shape, rank(operands[-1]), param.dtype, *(tensor.dtype for tensor in operands))
        alike.setdefault(key, []).append(i)
    for (m, n, *_), indices in alike.items():
        most = configs.together(m, n, configs.target(params[0].device))
        while indices:
            # Powers of two, so that a kernel is compiled for few numbers of matrices.
            count = min(most, 1 << (len(indices).bit_length() - 1))
            yield indices[:count]
            indices = indices[count:]


def _step_list(
    params,
    gradients,
    bases,
    exp_avgs,
    exp_avg_sqs,
    steps,
    *,
    projected,
    lr,
    weight_decay,
    scale,
    beta1,
    beta2,
    grad_scale,
    found_inf,
    **rest,
):
    if not params:
        return
    with on_device_of(params[0]):
        order = list(launches(params, gradients, bases))
        rows, _ = advance(
            [steps[i] for launch in order for i in launch],
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            scale=scale,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )
        counters = None if projected else counters_of(params[0].device)
        for launch, scalars in zip(order, rows.split([len(launch) for launch in order])):
            tensors = ([items[i] for i in launch] for items in (params, gradients, bases, exp_avgs, exp_avg_sqs))
            _update(*tensors, scalars, projected=projected, beta1=beta1, beta2=beta2, counters=counters, **rest)


def galore_step(
    param, grad, basis, exp_avg, exp_avg_sq, *, step, lr, beta1, beta2, eps, weight_decay, scale, left, int8_gemm=False
):
    """W <- (1 - lr*weight_decay) W - lr*scale*back(Adam(project(G))): one GaLore-AdamW step from the full gradient (m, n).

    param (m, n) fp32 | bf16 | fp16 and the moments (fp32, R's shape) are updated in place; basis (m or n, r). step counts from
    1; step and lr are numbers or 0-dim tensors. Channels of R that are not finite keep their moments and weights.
    """
    _ops.steps.check_galore_step(param, grad, basis, exp_avg, exp_avg_sq, left=left)
    _ops.rules.check_step_and_rate("galore_step", param.device, step, lr)
    _step(
        param,
        grad,
        basis,
        exp_avg,
        exp_avg_sq,
        projected=False,
        step=step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        scale=scale,
        left=left,
        int8_gemm=int8_gemm,
    )


def subspace_step(
    param, low_rank_grad, basis, exp_avg, exp_avg_sq, *, step, lr, beta1, beta2, eps, weight_decay, scale, left, int8_gemm=False
):
    """galore_step from a gradient that is already projected: R (r, n) if left, else (m, r), fp32."""
    _ops.steps.check_subspace_step(param, low_rank_grad, basis, exp_avg, exp_avg_sq, left=left)
    _ops.rules.check_step_and_rate("subspace_step", param.device, step, lr)
    _step(
        param,
        low_rank_grad,
        basis,
        exp_avg,
        exp_avg_sq,
        projected=True,
        step=step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        scale=scale,
        left=left,
        int8_gemm=int8_gemm,
    )


def galore_step_list(
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
    """galore_step for many matrices; steps (0-dim fp32) are advanced by one first.

    grad_scale multiplies the gradients; found_inf != 0 makes the whole step a no-op; skipped (int64) counts the weights left
    out. To change lr between replays of a captured step, keep it on the device.
    """
    _ops.steps.check_low_rank_lists(
        "galore_step",
        _ops.steps.check_galore_step,
        params,
        grads,
        bases,
        exp_avgs,
        exp_avg_sqs,
        steps,
        lr,
        left,
        (grad_scale, found_inf, skipped),
    )
    _step_list(
        params,
        grads,
        bases,
        exp_avgs,
        exp_avg_sqs,
        steps,
        projected=False,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        scale=scale,
        left=left,
        grad_scale=grad_scale,
        found_inf=found_inf,
        skipped=skipped,
        int8_gemm=int8_gemm,
    )


def subspace_step_list(
    params,
    low_rank_grads,
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
    """subspace_step for many matrices; steps and guards as in galore_step_list."""
    _ops.steps.check_low_rank_lists(
        "subspace_step",
        _ops.steps.check_subspace_step,
        params,
        low_rank_grads,
        bases,
        exp_avgs,
        exp_avg_sqs,
        steps,
        lr,
        left,
        (grad_scale, found_inf, skipped),
    )
    _step_list(
        params,
        low_rank_grads,
        bases,
        exp_avgs,
        exp_avg_sqs,
        steps,
        projected=True,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        scale=scale,
        left=left,
        grad_scale=grad_scale,
        found_inf=found_inf,
        skipped=skipped,
        int8_gemm=int8_gemm,
    )
