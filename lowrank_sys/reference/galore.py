"""GaLore (Zhao et al. 2024, Algorithm 2): Adam in the subspace of B, and the products around it."""

import torch

from lowrank_sys import _ops
from lowrank_sys._ops.numerics import accumulator, usable
from lowrank_sys.reference.adam import adam_, skip
from lowrank_sys.reference.int8_gemm import int8_gemm as product_of_codes


def project(grad, basis, *, left, int8_gemm=False):
    """R = Bᵀ G (r, n) if left, else G B (m, r); fp32. grad (m, n), basis (m or n, r): fp32 | bf16 | fp16.

    int8_gemm quantises both on the fly and multiplies codes (lowrank_sys.reference.int8_gemm).
    """
    if grad.dtype != torch.float64:
        _ops.projection.check_project(grad, basis, left=left)
    g, b = grad.to(accumulator(grad)), basis.to(accumulator(grad))
    if int8_gemm:
        return product_of_codes(b.T, g.T, g.dtype) if left else product_of_codes(g, b.T, g.dtype)
    return b.T @ g if left else g @ b


def back(low_rank, basis, left, int8_gemm=False):
    """B X (m, n) if left, else X Bᵀ."""
    b = basis.to(low_rank.dtype)
    if int8_gemm:
        return product_of_codes(b, low_rank.T, b.dtype) if left else product_of_codes(low_rank, b, b.dtype)
    return b @ low_rank if left else low_rank @ b.T


def back_project_(param, low_rank, basis, *, alpha=1.0, beta=1.0, left, int8_gemm=False):
    """W <- beta W + alpha back(X), in place. param (m, n) fp32 | bf16 | fp16; low_rank X of R's shape, fp32.

    beta = 0 does not read W, as in BLAS. int8_gemm as in `project`.
    """
    if param.dtype != torch.float64:
        _ops.projection.check_back_project(param, low_rank, basis, left=left)
    kept = beta * param.to(low_rank.dtype) if beta != 0 else 0
    param.copy_(kept + alpha * back(low_rank, basis, left, int8_gemm))


def channel_norms(grad, *, left):
    """2-norm of every channel of G (m, n): (n,) if left, else (m,); fp32."""
    if grad.dtype != torch.float64:
        _ops.projection.check_channel_norms(grad)
    return torch.linalg.vector_norm(grad.to(accumulator(grad)), dim=0 if left else 1)


def subspace_step(
    param, low_rank_grad, basis, exp_avg, exp_avg_sq, *, step, lr, beta1, beta2, eps, weight_decay, scale, left, int8_gemm=False
):
    """One AdamW step from R: W <- (1 - lr*weight_decay) W - lr*scale*back(Adam(R)).

    param (m, n) fp32 | bf16 | fp16 and the moments (fp32, R's shape) are updated in place; basis (m or n, r). step counts
    from 1. Channels of R that are not finite keep their moments and weights. int8_gemm as in `project`.
    """
    if param.dtype != torch.float64:
        _ops.steps.check_subspace_step(param, low_rank_grad, basis, exp_avg, exp_avg_sq, left=left)
        _ops.rules.check_step_and_rate("subspace_step", param.device, step, lr)
    _step(
        param,
        low_rank_grad,
        basis,
        exp_avg,
        exp_avg_sq,
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


def _step(param, low_rank_grad, basis, exp_avg, exp_avg_sq, *, step, lr, beta1, beta2, eps, weight_decay, scale, left, int8_gemm):
    """subspace_step without its checks; returns how many weights were left out."""
    axis = 0 if left else 1
    ok = usable(low_rank_grad).all(dim=axis, keepdim=True)
    x = adam_(low_rank_grad, exp_avg, exp_avg_sq, ok, step=step, beta1=beta1, beta2=beta2, eps=eps)
    w = param.to(low_rank_grad.dtype)
    param.copy_(torch.where(ok, (1 - lr * weight_decay) * w - (lr * scale) * back(x, basis, left, int8_gemm), w))
    return (~ok).sum() * param.shape[axis]


def galore_step(param, grad, basis, exp_avg, exp_avg_sq, *, step, lr, left, int8_gemm=False, **hyper):
    """project, then subspace_step: one GaLore-AdamW step from the full gradient (m, n)."""
    if param.dtype != torch.float64:
        _ops.steps.check_galore_step(param, grad, basis, exp_avg, exp_avg_sq, left=left)
        _ops.rules.check_step_and_rate("galore_step", param.device, step, lr)
    _step(
        param,
        project(grad, basis, left=left, int8_gemm=int8_gemm),
        basis,
        exp_avg,
        exp_avg_sq,
        step=step,
        lr=lr,
        left=left,
        int8_gemm=int8_gemm,
        **hyper,
    )


def _step_list(params, low_rank_grads, bases, exp_avgs, exp_avg_sqs, steps, *, found_inf, grad_scale, skipped, **hyper):
    if skip(params, found_inf):
        return
    for param, r, basis, exp_avg, exp_avg_sq, step in zip(params, low_rank_grads, bases, exp_avgs, exp_avg_sqs, steps):
        step += 1
        if grad_scale is not None:
            r = r * grad_scale
        left_out = _step(param, r, basis, exp_avg, exp_avg_sq, step=step, **hyper)
        if skipped is not None:
            skipped += left_out


def subspace_step_list(
    params,
    low_rank_grads,
    bases,
    exp_avgs,
    exp_avg_sqs,
    steps,
    *,
    lr,
    left,
    grad_scale=None,
    found_inf=None,
    skipped=None,
    int8_gemm=False,
    **hyper,
):
    """subspace_step for many matrices; steps (0-dim fp32) are advanced by one first. Guards as in adamw_step."""
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
        lr=lr,
        left=left,
        grad_scale=grad_scale,
        found_inf=found_inf,
        skipped=skipped,
        int8_gemm=int8_gemm,
        **hyper,
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
    left,
    grad_scale=None,
    found_inf=None,
    skipped=None,
    int8_gemm=False,
    **hyper,
):
    """galore_step for many matrices; steps (0-dim fp32) are advanced by one first. Guards as in adamw_step."""
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
    low_rank_grads = (project(grad, basis, left=left, int8_gemm=int8_gemm) for grad, basis in zip(grads, bases))
    _step_list(
        params,
        low_rank_grads,
        bases,
        exp_avgs,
        exp_avg_sqs,
        steps,
        lr=lr,
        left=left,
        grad_scale=grad_scale,
        found_inf=found_inf,
        skipped=skipped,
        int8_gemm=int8_gemm,
        **hyper,
    )
