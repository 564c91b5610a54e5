"""Steps that use the part of the gradient that a basis does not hold: APOLLO, Fira, FRUGAL.

A *channel* is a column of G if left, a row if right. A channel whose R is not finite, or whose sum of squares (of R and, with a
limiter, of G) overflows fp32, keeps its weights and moments, and no norm counts it.
"""

import torch

from lowrank_sys import _ops
from lowrank_sys._ops.numerics import accumulator, usable
from lowrank_sys.reference.adam import adam_, skip
from lowrank_sys.reference.galore import back, project
from lowrank_sys.reference.gaussian import gaussian_project

TINY = 1e-8  # beside norms that divide, as the papers' code has it
OVERFLOW = 2.0**128


def _low_rank_gradient(grad, basis, exp_avg, left):
    if not _ops.residual.is_key(basis):
        return project(grad, basis, left=left)
    seed, step, parameter, first = basis.tolist()
    _ops.gaussian.expect_first("apollo_step", first)
    return gaussian_project(
        grad, rank=exp_avg.shape[0 if left else 1], left=left, seed=seed, step=step, parameter=parameter, first=first
    )


def _rate(lr, step, beta1, beta2):
    """a = lr sqrt(1 - beta2^t) / (1 - beta1^t)."""
    step = torch.as_tensor(step, dtype=torch.float64)
    corrections = [
        -torch.expm1(step * torch.log(torch.tensor(beta, dtype=torch.float64, device=step.device))) for beta in (beta1, beta2)
    ]
    return lr * (corrections[1].sqrt() / corrections[0])


def _limit(norm, limiter, growth):
    """What the scaled gradient is divided by, so that its norm grows by at most `growth` a step; 0 in `limiter` is no norm yet."""
    known = (limiter > 0) & (norm > 0)
    divisor = torch.where(known, (norm / (limiter + TINY)).clamp(min=growth) / growth, 1.0)
    limiter.copy_(torch.where(norm > 0, norm / divisor, limiter))
    return divisor


def _ratio(r, exp_avg, exp_avg_sq, g_squares, limiter, gram, *, beta1, beta2, eps, alpha, left, per_tensor, growth, front):
    """Advances the moments; returns N = M / (sqrt(V) + eps), the coefficients s of the channels, and which were usable.

    s = |N| / (|R| + 1e-8) by channel, or one for the matrix, times `front`, over the limiter's divisor, whose norm is that of
    s o (G - alpha back(R)): by channel |G|² - 2 alpha |R|² + alpha² Rᵀ(BᵀB)R, with BᵀB = 1 if there is no Gram matrix.
    """
    axis = 0 if left else 1
    r_squares = (r * r).sum(axis, keepdim=True)
    ok = usable(r).all(axis, keepdim=True) & (r_squares < OVERFLOW)
    if limiter is not None:
        ok = ok & (g_squares < OVERFLOW)
    m = torch.where(ok, beta1 * exp_avg + (1 - beta1) * r, exp_avg)
    v = torch.where(ok, beta2 * exp_avg_sq + (1 - beta2) * r * r, exp_avg_sq)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    n = torch.where(ok, m / (v.sqrt() + eps), 0)
    n_squares, r_squares = (n * n).sum(axis, keepdim=True), torch.where(ok, r_squares, 0)
    if per_tensor:
        s = (n_squares.sum().sqrt() / (r_squares.sum().sqrt() + TINY)).expand_as(n_squares) * front
    else:
        s = n_squares.sqrt() / (r_squares.sqrt() + TINY) * front
    if limiter is not None:
        good = torch.where(ok, r, 0)
        in_basis = r_squares
        if gram is not None:
            in_basis = (good * (gram.to(r.dtype) @ good if left else good @ gram.to(r.dtype))).sum(axis, keepdim=True)
        squares = (torch.where(ok, g_squares, 0) - 2 * alpha * r_squares + alpha**2 * in_basis).clamp(min=0)
        s = s / _limit((s * s * squares).double().sum().sqrt(), limiter, growth)
    return n, s.to(r.dtype), ok


def _squares(grad, left, grad_scale):
    g = grad.to(accumulator(grad)) * grad_scale
    return (g * g).sum(0 if left else 1, keepdim=True)


def _store(param, update, ok, rate, lr, weight_decay):
    """W <- (1 - lr weight_decay) W - rate update where ok; returns how many weights were left out."""
    w = param.to(update.dtype)
    param.copy_(torch.where(ok, (1 - lr * weight_decay) * w - rate * update, w))
    return (~ok.expand_as(param)).sum()


def apollo_update(
    grad,
    basis,
    exp_avg,
    exp_avg_sq,
    limiter,
    *,
    step,
    lr,
    beta1,
    beta2,
    eps,
    scale,
    left,
    per_tensor=False,
    scale_front=False,
    growth=1.01,
    grad_scale=1.0,
):
    """Advances the moments and the limiter; returns sqrt(scale) s o G, which channels are usable, and its rate a."""
    r = _low_rank_gradient(grad, basis, exp_avg, left) * grad_scale
    squares = None if limiter is None else _squares(grad, left, grad_scale)
    front = scale**0.5
    _, s, ok = _ratio(
        r,
        exp_avg,
        exp_avg_sq,
        squares,
        limiter,
        None,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        alpha=0.0,
        left=left,
        per_tensor=per_tensor,
        growth=growth,
        front=front if scale_front else 1.0,
    )
    update = s * (1.0 if scale_front else front) * (grad.to(r.dtype) * grad_scale)
    return update, ok, _rate(lr, step, beta1, beta2)


def _apollo(param, *tensors, lr, weight_decay, **hyper):
    update, ok, rate = apollo_update(*tensors, lr=lr, **hyper)
    return _store(param, update, ok, rate, lr, weight_decay)


def _fira(
    param,
    grad,
    basis,
    exp_avg,
    exp_avg_sq,
    limiter,
    gram,
    *,
    step,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    alpha,
    left,
    growth,
    grad_scale=1.0,
):
    r = project(grad, basis, left=left) * grad_scale
    squares = None if limiter is None else _squares(grad, left, grad_scale)
    n, s, ok = _ratio(
        r,
        exp_avg,
        exp_avg_sq,
        squares,
        limiter,
        gram,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        alpha=alpha,
        left=left,
        per_tensor=False,
        growth=growth,
        front=1.0,
    )
    residual = grad.to(r.dtype) * grad_scale - alpha * back(r, basis, left)
    return _store(param, alpha * back(n, basis, left) + s * residual, ok, _rate(lr, step, beta1, beta2), lr, weight_decay)


def _frugal(
    param,
    grad,
    basis,
    exp_avg,
    exp_avg_sq,
    *,
    step,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    scale,
    residual_scale,
    sign,
    left,
    grad_scale=1.0,
):
    r = project(grad, basis, left=left) * grad_scale
    ok = usable(r).all(0 if left else 1, keepdim=True)
    x = adam_(r, exp_avg, exp_avg_sq, ok, step=step, beta1=beta1, beta2=beta2, eps=eps)
    residual = grad.to(r.dtype) * grad_scale - back(r, basis, left)
    update = scale * back(x, basis, left) + residual_scale * (residual.sign() if sign else residual)
    return _store(param, update, ok, lr, lr, weight_decay)


def _check_one(op, check, param, *tensors, step, lr, left):
    if param.dtype != torch.float64:
        check(param, *tensors, left=left)
        _ops.rules.check_step_and_rate(op, param.device, step, lr)


def apollo_step(
    param,
    grad,
    basis,
    exp_avg,
    exp_avg_sq,
    limiter=None,
    *,
    step,
    lr,
    left,
    per_tensor=False,
    scale_front=False,
    growth=1.01,
    **hyper,
):
    """APOLLO (Zhu et al. 2024): W <- (1 - lr*weight_decay) W - a sqrt(scale) s o G, a = lr sqrt(1 - beta2^t) / (1 - beta1^t).

    s = |N| / (|R| + 1e-8) for every channel, or one for the matrix if per_tensor (APOLLO-Mini), N = M / (sqrt(V) + eps) with
    the moments M, V of R = project(G). param (m, n) fp32 | bf16 | fp16, updated in place; grad (m, n); basis (m or n, r), or the
    key of a Gaussian one: int64 (4,) of seed, refresh, parameter and first row; exp_avg, exp_avg_sq of R's shape, fp32. limiter
    (0-dim fp32, 0 before the first step) holds the norm of s o G, which may grow by `growth` a step; None is no limit. The
    limiter sees sqrt(scale) if scale_front. step counts from 1.
    """
    _check_one(
        "apollo_step",
        _ops.residual.check_apollo_step,
        param,
        grad,
        basis,
        exp_avg,
        exp_avg_sq,
        limiter,
        step=step,
        lr=lr,
        left=left,
    )
    _apollo(
        param,
        grad,
        basis,
        exp_avg,
        exp_avg_sq,
        limiter,
        step=step,
        lr=lr,
        left=left,
        per_tensor=per_tensor,
        scale_front=scale_front,
        growth=growth,
        **hyper,
    )


def fira_step(param, grad, basis, exp_avg, exp_avg_sq, limiter=None, gram=None, *, step, lr, left, growth=1.01, **hyper):
    """Fira (Chen et al. 2024): W <- (1 - lr*weight_decay) W - a [alpha back(N) + s o (G - alpha back(R))].

    a, s, N, R, limiter (of the second term) and tensors as in apollo_step, with a basis in memory. gram = BᵀB (r, r) fp32 for a
    basis whose columns are not orthonormal; the limiter takes it for the identity if None.
    """
    _check_one(
        "fira_step",
        _ops.residual.check_fira_step,
        param,
        grad,
        basis,
        exp_avg,
        exp_avg_sq,
        limiter,
        gram,
        step=step,
        lr=lr,
        left=left,
    )
    _fira(param, grad, basis, exp_avg, exp_avg_sq, limiter, gram, step=step, lr=lr, left=left, growth=growth, **hyper)


def frugal_step(param, grad, basis, exp_avg, exp_avg_sq, *, step, lr, left, **hyper):
    """FRUGAL (Zmushko et al. 2024): W <- (1 - lr*weight_decay) W - lr [scale back(Adam(R)) + residual_scale phi(G - back(R))].

    phi is the sign, or the identity if not `sign`; Adam as in galore_step, with bias correction; tensors as there.
    """
    _check_one("frugal_step", _ops.residual.check_frugal_step, param, grad, basis, exp_avg, exp_avg_sq, step=step, lr=lr, left=left)
    _frugal(param, grad, basis, exp_avg, exp_avg_sq, step=step, lr=lr, left=left, **hyper)


def _list(op, check, run, lists, extras, steps, *, lr, left, grad_scale, found_inf, skipped, **hyper):
    full = _ops.residual.check_list(op, check, *lists, extras, steps, lr, left, (grad_scale, found_inf, skipped))
    if skip(lists[0], found_inf):
        return
    for *tensors, step in zip(*lists, *full, steps):
        step += 1
        scale = 1.0 if grad_scale is None else grad_scale
        left_out = run(*tensors, step=step, lr=lr, left=left, grad_scale=scale, **hyper)
        if skipped is not None:
            skipped += left_out


def apollo_step_list(
    params,
    grads,
    bases,
    exp_avgs,
    exp_avg_sqs,
    limiters,
    steps,
    *,
    lr,
    left,
    per_tensor=False,
    scale_front=False,
    growth=1.01,
    grad_scale=None,
    found_inf=None,
    skipped=None,
    **hyper,
):
    """apollo_step for many matrices; no limiters is no limit. steps (0-dim fp32) advance by one first; guards as in adamw_step."""
    _list(
        "apollo_step",
        _ops.residual.check_apollo_step,
        _apollo,
        (params, grads, bases, exp_avgs, exp_avg_sqs),
        {"limiters": limiters},
        steps,
        lr=lr,
        left=left,
        per_tensor=per_tensor,
        scale_front=scale_front,
        growth=growth,
        grad_scale=grad_scale,
        found_inf=found_inf,
        skipped=skipped,
        **hyper,
    )


def fira_step_list(
    params,
    grads,
    bases,
    exp_avgs,
    exp_avg_sqs,
    limiters,
    grams,
    steps,
    *,
    lr,
    left,
    growth=1.01,
    grad_scale=None,
    found_inf=None,
    skipped=None,
    **hyper,
):
    """fira_step for many matrices; no limiters is no limit, no Gram matrices are orthonormal bases. Steps and guards as in
    apollo_step_list."""
    _list(
        "fira_step",
        _ops.residual.check_fira_step,
        _fira,
        (params, grads, bases, exp_avgs, exp_avg_sqs),
        {"limiters": limiters, "grams": grams},
        steps,
        lr=lr,
        left=left,
        growth=growth,
        grad_scale=grad_scale,
        found_inf=found_inf,
        skipped=skipped,
        **hyper,
    )


def frugal_step_list(
    params, grads, bases, exp_avgs, exp_avg_sqs, steps, *, lr, left, grad_scale=None, found_inf=None, skipped=None, **hyper
):
    """frugal_step for many matrices. Steps and guards as in apollo_step_list."""
    _list(
        "frugal_step",
        _ops.residual.check_frugal_step,
        _frugal,
        (params, grads, bases, exp_avgs, exp_avg_sqs),
        {},
        steps,
        lr=lr,
        left=left,
        grad_scale=grad_scale,
        found_inf=found_inf,
        skipped=skipped,
        **hyper,
    )
