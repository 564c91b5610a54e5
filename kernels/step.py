"""The low-rank step on the GPU, for every combination of policies: project -> rule -> apply.

G is read once, twice with a remainder; W is read once and written once; nothing else of their size exists. Adam on moments in fp32
is the projection's epilogue. A block of 8-bit moments is wider than a tile of the projection and may span channels, so that R goes
through memory once, in fp32, to the CUDA C++ of `adam_8bit_low_rank_`.
"""

from typing import NamedTuple

import torch

from lowrank_sys._ops.step import check_step
from lowrank_sys.kernels import configs
from lowrank_sys.kernels.apply import NEAREST, SCALED, SIGNED, Drawn, launch_apply
from lowrank_sys.kernels.basis import Int4Basis, rank
from lowrank_sys.kernels.channels import launch_sums
from lowrank_sys.kernels.coefficient import room_for_coefficients
from lowrank_sys.kernels.common import on_device_of
from lowrank_sys.kernels.gaussian import launch_gaussian_project
from lowrank_sys.kernels.int8_gemm import launch_back_project_int8, launch_project_int8
from lowrank_sys.kernels.project import counters_of, launch_project
from lowrank_sys.kernels.rule import ADAM, RATIO, launch_rule
from lowrank_sys.kernels.scalars import advance, as_scalar, read


class Options(NamedTuple):
    """Of a step, as its schema has them."""

    lr: torch.Tensor
    weight: str
    basis: str
    moments: str
    rule: str
    remainder: str
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    scale: float
    left: bool
    residual_scale: float = 1.0
    sign: bool = False
    per_tensor: bool = False
    scale_front: bool = False
    growth: float = 1.01
    projected: bool = False
    int8_gemm: bool = False
    advance: bool = True
    group_size: int = 256
    basis_group_size: int = 256
    stochastic: bool = False
    seed: int = 0
    parameters: tuple = ()
    offsets: tuple = ()
    grad_scale: torch.Tensor | None = None
    found_inf: torch.Tensor | None = None
    skipped: torch.Tensor | None = None
    op: str = "step"

    def draws(self, weight):
        """Whether its rounding takes random bits."""
        return self.weight == "int8" or (self.stochastic and weight.itemsize == 2)

    @property
    def adam(self):
        return {"beta1": self.beta1, "beta2": self.beta2, "eps": self.eps, "left": self.left}


def step(*lists, **options):
    """One step of every matrix; arguments, types and state as the oracle's `step`."""
    matrices = check_step(*lists, **options)
    if not matrices:
        return
    h = Options(**options)
    device = matrices[0].weight.device
    with on_device_of(matrices[0].weight):
        launches = list(together(matrices, h))
        rows, numbers = _scalars([matrix.step for launch in launches for matrix in launch], device, h)
        counters = None if h.projected else counters_of(device)
        first = 0
        for launch in launches:
            its = slice(first, first := first + len(launch))
            if launch[0].moments[0].numel():
                run = _in_int8 if h.int8_gemm else _low_rank if h.remainder == "none" else _with_remainder
                run(launch, rows[its], None if numbers is None else numbers[its], counters, h)


def together(matrices, h):
    """Lists of matrices that share launches: up to 8 of one shape and set of dtypes. A remainder's launches take one."""
    if h.int8_gemm or h.remainder != "none":
        yield from ([matrix] for matrix in matrices)
        return
    alike = {}
    for matrix in matrices:
        weight, gradient, basis = matrix.weight, matrix.gradient, matrix.basis
        key = (*weight.shape, rank(_basis(matrix, h)), weight.dtype, gradient.dtype, basis.dtype)
        alike.setdefault(key, []).append(matrix)
    for (m, n, *_), group in alike.items():
        most = configs.together(m, n, configs.target(matrices[0].weight.device))
        yield from (group[i : i + most] for i in range(0, len(group), most))


def _scalars(steps, device, h):
    """(rows, numbers of the random bits or None) of the matrices' steps."""
    options = {"lr": h.lr, "beta1": h.beta1, "beta2": h.beta2, "weight_decay": h.weight_decay}
    options |= {"grad_scale": h.grad_scale, "found_inf": h.found_inf, "draws": h.weight == "int8" or h.stochastic}
    # A remainder is not scaled with back(X).
    options["scale"] = h.scale if h.remainder == "none" else 1.0
    return advance(steps, **options) if h.advance else read(steps, device, **options)


def _basis(matrix, h):
    if h.basis == "int4":
        return Int4Basis(matrix.basis, matrix.basis_scale, matrix.basis_offset, h.basis_group_size)
    return matrix.basis


def _empty(matrix, dtype=torch.float32):
    """Room for R, or what has its shape."""
    return torch.empty(matrix.moments[0].shape, dtype=dtype, device=matrix.weight.device)


def _adam_8bit(launch, low_rank_grads, updates, steps, h):
    torch.ops.lowrank.adam_8bit_low_rank_(
        low_rank_grads,
        updates,
        *map(list, zip(*(matrix.moments for matrix in launch))),
        steps,
        grad_scale=h.grad_scale,
        found_inf=h.found_inf,
        **h.adam,
    )


def _adam(launch, low_rank_grads, updates, scalars, h):
    """updates <- Adam's from R."""
    if h.moments == "8bit":
        device = scalars.device
        # Counters of a step that advances are what the op takes.
        steps = [m.step if h.advance else as_scalar(m.step, device).to(torch.float32) for m in launch]
        _adam_8bit(launch, low_rank_grads, updates, steps, h)
    else:
        launch_rule(low_rank_grads, updates, list(zip(*(m.moments for m in launch))), scalars, rule=ADAM, **h.adam)


def _apply(launch, scalars, numbers, h, low_ranks=None, bases=None, **residual):
    """The update of the weights; those that draw random bits have streams of their own, and a launch each."""
    options = {"left": h.left, "skipped": h.skipped, **residual}
    if not h.draws(launch[0].weight):
        launch_apply([matrix.weight for matrix in launch], scalars, low_ranks=low_ranks, bases=bases, **options)
        return
    for i, matrix in enumerate(launch):
        of_it = {} if low_ranks is None else {"low_ranks": [low_ranks[i]], "bases": [bases[i]]}
        launch_apply([matrix.weight], scalars[i], drawn=_drawn(matrix, numbers[i], h), **of_it, **options)


def _drawn(matrix, number, h):
    group_size = h.group_size if h.weight == "int8" else 0
    return Drawn(matrix.weight_scale, number, h.seed, matrix.parameter, matrix.offset, group_size)


def _low_rank(launch, scalars, numbers, counters, h):
    """Matrices of one shape: G, or R if it is projected already -> Adam's updates X -> W."""
    gradients, bases = [matrix.gradient for matrix in launch], [_basis(matrix, h) for matrix in launch]
    # A 16-bit X keeps the second product on the 16-bit tensor cores.
    updates = [_empty(matrix, basis.dtype) for matrix, basis in zip(launch, bases)]
    if h.projected:
        _adam(launch, gradients, updates, scalars, h)
    elif h.moments == "fp32":
        first, second = zip(*(matrix.moments for matrix in launch))
        launch_project(gradients, bases, updates, counters=counters, exp_avgs=first, exp_avg_sqs=second, scalars=scalars, **h.adam)
    else:
        low_rank_grads = [_empty(matrix) for matrix in launch]
        launch_project(gradients, bases, low_rank_grads, left=h.left, counters=counters)
        _adam(launch, low_rank_grads, updates, scalars, h)
    _apply(launch, scalars, numbers, h, updates, bases)


def _in_int8(launch, scalars, numbers, counters, h):
    """One matrix, with products in INT8; X stays in fp32, so that its codes are the oracle's."""
    (x,), update = launch, _empty(launch[0])
    if h.projected:
        _adam(launch, [x.gradient], [update], scalars, h)
    else:
        exp_avg, exp_avg_sq = x.moments
        launch_project_int8(
            x.gradient, x.basis, update, counters=counters, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, scalars=scalars, **h.adam
        )
    drawn = _drawn(x, numbers[0], h) if h.draws(x.weight) else NEAREST
    launch_back_project_int8(x.weight, update, x.basis, scalars, left=h.left, step=True, skipped=h.skipped, drawn=drawn)


def _with_remainder(launch, scalars, numbers, counters, h):
    """One matrix: G -> R -> X or N, and the factors of the channels -> W."""
    (x,), basis, r = launch, _basis(launch[0], h), _empty(launch[0])
    squares = None
    if x.limiter is not None:
        channels = x.weight.shape[1 if h.left else 0]
        squares = lambda splits: torch.empty((splits, channels), dtype=torch.float32, device=r.device)  # noqa: E731
    launched = {"left": h.left, "counters": counters, "scalars": scalars, "squares": squares}
    if h.basis == "key":
        squares = launch_gaussian_project(x.gradient, r, key=basis, **launched)
    else:
        squares = launch_project([x.gradient], [basis], [r], **launched)

    if h.remainder == "state-free":
        update = _empty(x)
        _adam(launch, [r], [update], scalars, h)
        phi = {"phi": SIGNED if h.sign else SCALED, "residual_scale": h.residual_scale}
    else:
        update, coefficients = _ratio(x, r, squares, scalars, counters, h)
        phi = {"phi": SCALED, "coefficients": coefficients}
    if h.remainder != "scaled-gradient":
        phi |= {"low_ranks": [update], "bases": [basis], "low_rank_grad": r, "gain": h.scale}
    _apply(launch, scalars, numbers, h, grad=x.gradient, **phi)


def _ratio(x, r, squares, scalars, counters, h):
    """(N where it is applied or the moments are in 8 bits, the coefficients of the channels); the moments advance."""
    alpha = h.scale if h.remainder == "scaled-residual" else 0.0
    gram_grad = None
    if x.gram is not None and x.limiter is not None:
        # The Gram matrix is symmetric: BᵀB R is a projection of R.
        gram_grad = torch.empty_like(r)
        launch_project([r], [x.gram], [gram_grad], left=h.left, counters=counters, scalars=scalars)
    front = h.scale**0.5 if h.remainder == "scaled-gradient" else 1.0
    channels = r.shape[1 if h.left else 0]
    room = room_for_coefficients(
        channels,
        x.limiter,
        counters,
        r.device,
        growth=h.growth,
        front=front if h.scale_front else 1.0,
        behind=1.0 if h.scale_front else front,
        per_tensor=h.per_tensor,
    )
    measured = {"squares": squares, "gram_grad": gram_grad, "alpha": alpha}
    if h.moments == "fp32":
        outs = [_empty(x)] if h.remainder == "scaled-residual" else None
        launch_rule([r], outs, [[moment] for moment in x.moments], scalars, rule=RATIO, room=room, **measured, **h.adam)
        return outs and outs[0], room["coefficients"]
    update = r if h.remainder == "scaled-gradient" else _empty(x)
    sums = torch.empty((2, channels), dtype=torch.float32, device=r.device)
    launch_sums(r, sums, scalars, left=h.left, **measured)
    # At a step of infinity both bias corrections are 1, and Adam's update is N.
    _adam_8bit([x], [r], [update], [torch.full((), torch.inf, device=r.device)], h)
    launch_sums(update, sums, scalars, left=h.left, room=room)
    return update, room["coefficients"]
