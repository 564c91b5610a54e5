"""The low-rank step in plain PyTorch: project -> rule -> apply, for every combination of policies (lowrank_sys/_ops/step.py).

A *channel* is a column of G if left, a row if right. A channel whose R is not finite keeps its weights and moments, and no norm
counts it; with norm ratios, and with a limiter, so does one whose sum of squares (of R, and of G) overflows fp32.
"""

import torch

from lowrank_sys import _ops
from lowrank_sys._ops.numerics import accumulator, usable
from lowrank_sys._ops.step import check_step, matrices
from lowrank_sys.reference.adam import adam_, is_truth, skip
from lowrank_sys.reference.blockwise import Moments
from lowrank_sys.reference.galore import back, project
from lowrank_sys.reference.gaussian import gaussian_project
from lowrank_sys.reference.int4 import dequantize_int4
from lowrank_sys.reference.int8 import int8_update_
from lowrank_sys.reference.rounding import write_

TINY = 1e-8  # beside norms that divide, as the papers' code has it
OVERFLOW = 2.0**128


def step(
    weights, weight_scales, gradients, bases, basis_parts, states, steps, *, lr, weight, basis, moments, rule, remainder,
    weight_decay, left, projected=False, advance=True, stochastic=False, parameters=(), offsets=(), grad_scale=None,
    found_inf=None, skipped=None, op="step", checked=True, **options,
):  # fmt: skip
    """One step of every matrix, in place.

        W <- (1 - lr*weight_decay) W - lr*scale*back(X),  X = Adam(R),                     remainder none (GaLore)
        W <- (1 - lr*weight_decay) W - a sqrt(scale) s o G,                                scaled-gradient (APOLLO)
        W <- (1 - lr*weight_decay) W - a [scale back(N) + s o (G - scale back(R))],        scaled-residual (Fira)
        W <- (1 - lr*weight_decay) W - lr [scale back(X) + residual_scale phi(G - back(R))],  state-free (FRUGAL)

    with R = project(G), N = M / (sqrt(V) + eps) of the moments M, V of R, a = lr sqrt(1 - beta2^t) / (1 - beta1^t), and
    s = |N| / (|R| + 1e-8) for every channel, or one for the matrix if per_tensor (APOLLO-Mini). phi is the sign, or the identity if
    not `sign`.

    weights (m, n): fp32 | bf16 | fp16, or int8 codes with weight_scales (m, ⌈n/group_size⌉) as in `quantize_int8`, rounded as in
    `int8_update_` at (seed, step, parameters, offsets). stochastic: weights in 16 bits are rounded as in `round_stochastic_`, with
    the same bits. gradients: G (m, n) fp32 | bf16 | fp16, or R (r, n) if left, else (m, r),
    fp32, if `projected`. bases (m or n, r); or packed codes, with scales and offsets as basis_parts, of `quantize_int4` in groups
    of basis_group_size; or keys: int64 (4,) of seed, refresh, parameter and first row. states: exp_avg and exp_avg_sq of R's
    shape, fp32, or codes and absmax as in `adam_8bit_low_rank_`; then limiters (0-dim fp32, 0 before the first step), which hold
    the norm of s o (what it scales) and let it grow by `growth` a step; the limiter of APOLLO sees sqrt(scale) if scale_front.
    basis_parts may end with BᵀB (r, r) fp32 of bases whose columns are not orthonormal, which the limiter of Fira needs.

    steps: 0-dim fp32 counters, advanced by one first; unless `advance` the step's count from 1, of any number type, only read.
    lr: 0-dim. grad_scale multiplies the gradients, found_inf != 0 makes the step a no-op, skipped (int64) counts the weights left
    out. int8_gemm as in `project`. Errors name `op`; without `checked`, the rules do not hold for weights in fp64.
    """
    lists = (weights, weight_scales, gradients, bases, basis_parts, states, steps)
    policies = {"weight": weight, "basis": basis, "moments": moments, "remainder": remainder}
    if is_truth(weights, checked):
        rows = matrices(op, *lists, **policies, parameters=parameters, offsets=offsets, stochastic=stochastic)
    else:
        rows = check_step(
            *lists, lr=lr, **policies, rule=rule, left=left, projected=projected, advance=advance, stochastic=stochastic,
            parameters=parameters,
            offsets=offsets, grad_scale=grad_scale, found_inf=found_inf, skipped=skipped, op=op,
            **{key: options[key] for key in ("int8_gemm", "group_size", "basis_group_size") if key in options},
        )  # fmt: skip
    if skip(rows, found_inf):
        return
    factor = 1.0 if grad_scale is None else grad_scale.reshape(())
    for x in rows:
        if advance:
            x.step.add_(1)
        left_out = _step(
            x,
            _Options(**options, left=left, weight_decay=weight_decay, stochastic=stochastic, op=op),
            lr,
            projected,
            factor,
            **policies,
        )
        if skipped is not None:
            skipped += left_out


class _Options:
    """The numbers of a step, by name."""

    def __init__(
        self, *, beta1, beta2, eps, weight_decay, scale, left, residual_scale=1.0, sign=False, per_tensor=False, scale_front=False,
        growth=1.01, int8_gemm=False, group_size=256, basis_group_size=256, stochastic=False, seed=0, op="step",
    ):  # fmt: skip
        self.__dict__.update(locals())


def _step(x, o, lr, projected, grad_scale, *, weight, basis, moments, remainder):
    """The step of one matrix; returns how many weights were left out."""
    axis, ratio = 0 if o.left else 1, remainder.startswith("scaled")
    b = _values(x, basis, o)
    r = x.gradient if projected else _project(x, b, basis, o)
    r = r * grad_scale
    ok = usable(r).all(axis, keepdim=True)
    if ratio:
        r_squares = (r * r).sum(axis, keepdim=True)
        ok = ok & (r_squares < OVERFLOW)
        if x.limiter is not None:
            g_squares = _squares(x.gradient, axis, grad_scale)
            ok = ok & (g_squares < OVERFLOW)
    hyper = {
        "beta1": o.beta1,
        "beta2": o.beta2,
        "eps": o.eps,
        "step": float("inf") if ratio else x.step,
    }  # no correction, or Adam's
    if moments == "8bit":
        update = Moments(*x.moments, r.dtype).adam(r, ok, **hyper)
    else:
        update = adam_(r, *x.moments, ok, **hyper)

    if not ratio and remainder == "none":
        update, rate = back(update, b, o.left, o.int8_gemm), lr * o.scale
    elif not ratio:
        residual = x.gradient.to(r.dtype) * grad_scale - back(r, b, o.left)
        update = o.scale * back(update, b, o.left) + o.residual_scale * (residual.sign() if o.sign else residual)
        rate = lr
    else:
        alpha = o.scale if remainder == "scaled-residual" else 0.0
        front = o.scale**0.5 if remainder == "scaled-gradient" else 1.0
        n_squares, r_squares = (update * update).sum(axis, keepdim=True), torch.where(ok, r_squares, 0)
        if o.per_tensor:
            s = (n_squares.sum().sqrt() / (r_squares.sum().sqrt() + TINY)).expand_as(n_squares)
        else:
            s = n_squares.sqrt() / (r_squares.sqrt() + TINY)
        s = s * (front if o.scale_front else 1.0)
        if x.limiter is not None:
            squares = _residual_squares(torch.where(ok, r, 0), torch.where(ok, g_squares, 0), r_squares, x.gram, alpha, o.left)
            s = s / _limit((s * s * squares).double().sum().sqrt(), x.limiter, o.growth)
        s = s.to(r.dtype) * (1.0 if o.scale_front else front)
        direction = x.gradient.to(r.dtype) * grad_scale
        if remainder == "scaled-residual":
            update = alpha * back(update, b, o.left) + s * (direction - alpha * back(r, b, o.left))
        else:
            update = s * direction
        rate = _corrected(lr, x.step, o.beta1, o.beta2)
    return _write(x, update, ok, rate, lr, o, weight)


def _values(x, basis, o):
    """The basis (d, r) as a matrix; None for a key, which only projects."""
    if basis == "int4":
        return dequantize_int4(
            x.basis, x.basis_scale, x.basis_offset, d=x.weight.shape[0 if o.left else 1], group_size=o.basis_group_size
        )
    return x.basis if basis == "dense" else None


def _project(x, b, basis, o):
    if basis != "key":
        return project(x.gradient, b, left=o.left, int8_gemm=o.int8_gemm)
    seed, refresh, parameter, first = x.basis.tolist()
    _ops.gaussian.expect_first(o.op, first)
    rank = x.moments[0].shape[0 if o.left else 1]
    return gaussian_project(x.gradient, rank=rank, left=o.left, seed=seed, step=refresh, parameter=parameter, first=first)


def _squares(grad, axis, grad_scale):
    g = grad.to(accumulator(grad)) * grad_scale
    return (g * g).sum(axis, keepdim=True)


def _residual_squares(r, g_squares, r_squares, gram, alpha, left):
    """|G - alpha back(R)|² by channel: |G|² - 2 alpha |R|² + alpha² Rᵀ(BᵀB)R, with BᵀB = 1 if there is no Gram matrix."""
    in_basis = r_squares
    if gram is not None:
        in_basis = (r * (gram.to(r.dtype) @ r if left else r @ gram.to(r.dtype))).sum(0 if left else 1, keepdim=True)
    return (g_squares - 2 * alpha * r_squares + alpha**2 * in_basis).clamp(min=0)


def _limit(norm, limiter, growth):
    """What the scaled gradient is divided by, so that its norm grows by at most `growth` a step; 0 in `limiter` is no norm yet."""
    known = (limiter > 0) & (norm > 0)
    divisor = torch.where(known, (norm / (limiter + TINY)).clamp(min=growth) / growth, 1.0)
    limiter.copy_(torch.where(norm > 0, norm / divisor, limiter))
    return divisor


def _corrected(lr, step, beta1, beta2):
    """a = lr sqrt(1 - beta2^t) / (1 - beta1^t)."""
    step = torch.as_tensor(step, dtype=torch.float64)
    corrections = [
        -torch.expm1(step * torch.log(torch.tensor(beta, dtype=torch.float64, device=step.device))) for beta in (beta1, beta2)
    ]
    return lr * (corrections[1].sqrt() / corrections[0])


def _write(x, update, ok, rate, lr, o, weight):
    """W <- (1 - lr weight_decay) W - rate update where ok; returns how many weights were left out."""
    if weight == "int8":
        lr, rate = torch.as_tensor(lr, dtype=torch.float64), torch.as_tensor(rate, dtype=torch.float64)
        int8_update_(
            x.weight, x.weight_scale, torch.where(ok, update, torch.nan), alpha=-rate, decay=1 - lr * o.weight_decay, seed=o.seed,
            step=int(x.step) % 2**32, parameter=x.parameter, offset=x.offset, group_size=o.group_size,
        )  # fmt: skip
    else:
        w = x.weight.to(update.dtype)
        new = torch.where(ok, (1 - lr * o.weight_decay) * w - rate * update, w)
        write_(x.weight, new, stochastic=o.stochastic, seed=o.seed, step=x.step, parameter=x.parameter, offset=x.offset)
    return (~ok.expand_as(x.weight)).sum()
