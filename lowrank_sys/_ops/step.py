"""The low-rank step, project -> rule -> apply, as one op for every combination of policies.

    W <- (1 - lr*weight_decay) W - lr*(scale*back(X) + c o phi(G - back(R))),    R = project(G),  X = rule(R, moments)

| policy    | members                                                                                                  |
|-----------|----------------------------------------------------------------------------------------------------------|
| weight    | float: (m, n) fp32, bf16 or fp16, rounded to nearest, or stochastically if `stochastic`; int8: codes and  |
|           | their scales, always rounded stochastically                                                              |
| basis     | dense: a matrix; int4: packed codes, their scales and offsets; key: of a Gaussian basis, made as it is read |
| moments   | fp32: of R's shape; 8bit: codes and absmax in blocks                                                     |
| rule      | adam: with bias correction; ratio-adam: N = M / (sqrt(V) + eps), whose correction multiplies the rate    |
| remainder | none: dropped; scaled-gradient: APOLLO's s o G, no back(X); scaled-residual: Fira's s o (G - scale*back(R)); |
|           | state-free: FRUGAL's sign of G - back(R), or G - back(R) itself                                          |
"""

from typing import NamedTuple

import torch

from lowrank_sys._ops.blockwise import expect_moments
from lowrank_sys._ops.int4 import expect_int4
from lowrank_sys._ops.int8 import expect_int8, expect_stream
from lowrank_sys._ops.rounding import STOCHASTIC, check_numbers
from lowrank_sys._ops.rules import (
    ADAM,
    GUARDS,
    check_guards,
    define,
    expect,
    expect_basis,
    expect_dtype,
    expect_float,
    expect_like,
    expect_matrix,
    expect_scalar,
    fake,
)
from lowrank_sys._ops.sparse import expect_indices, expect_row_scale, selected_shape
from lowrank_sys._ops.workspace import (
    copy_unless_fp32,
    fp32,
    int4_panel,
    int8_operand,
    int8_panels,
    int8_tile_shape,
    launched_together,
    reused,
    split_parts,
    tile_shape,
    tile_unless_fp32,
    workspace,
)

WEIGHTS = ("float", "int8")
BASES = {"dense": (), "int4": ("basis_scale", "basis_offset"), "key": ()}  # basis -> what basis_parts hold
MOMENTS = {
    "fp32": ("exp_avg", "exp_avg_sq"),
    "8bit": ("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax"),
}  # moments -> what states hold
# remainder -> the rule that it goes with.
RULES = {"none": "adam", "scaled-gradient": "ratio-adam", "scaled-residual": "ratio-adam", "state-free": "adam"}
LIMITED = ("scaled-gradient", "scaled-residual")  # remainders whose states may end with limiters

SCHEMAS = {
    # Lists of basis_parts and states hold one column after the other: all scales, then all offsets. The last column may be
    # absent: BᵀB of bases that are not orthonormal (scaled-residual), and limiters.
    "step": "(Tensor(a!)[] weights, Tensor(b!)[] weight_scales, Tensor[] gradients, Tensor[] bases, Tensor[] basis_parts, "
    "Tensor(c!)[] states, Tensor(d!)[] steps, *, Tensor lr, str weight, str basis, str moments, str rule, str remainder, "
    f"{ADAM}, float scale, bool left, float residual_scale=1.0, bool sign=False, bool per_tensor=False, bool scale_front=False, "
    "float growth=1.01, bool projected=False, bool int8_gemm=False, bool advance=True, int group_size=256, "
    f'int basis_group_size=256, {STOCHASTIC}, {GUARDS}, str op="step") -> ()',
    # On rows of the identity, with a scale each (float, fp32, adam, none): touches the selected rows alone, unless W decays.
    # row_scales is empty where no matrix has one.
    "step.rows": "(Tensor(a!)[] weights, Tensor[] gradients, Tensor[] indices, Tensor[] row_scales, Tensor(b!)[] exp_avgs, "
    f"Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, *, Tensor lr, {ADAM}, float scale, bool left, bool advance=True, {STOCHASTIC}, "
    f'{GUARDS}, str op="step") -> ()',
}


class Matrix(NamedTuple):
    """One matrix of a step; what its policies do not have is None."""

    weight: torch.Tensor
    weight_scale: torch.Tensor | None
    gradient: torch.Tensor
    basis: torch.Tensor
    basis_scale: torch.Tensor | None
    basis_offset: torch.Tensor | None
    gram: torch.Tensor | None
    moments: tuple
    limiter: torch.Tensor | None
    step: torch.Tensor
    parameter: int
    offset: int


def rank_of(basis, kind, exp_avg, left):
    """Number of basis vectors."""
    if kind == "key":
        return exp_avg.shape[0 if left else 1]
    return basis.shape[0 if kind == "int4" else 1]


def low_rank_shape(matrix, rank, left):
    """Shape of R."""
    return (rank, matrix.shape[1]) if left else (matrix.shape[0], rank)


def check_policies(op, *, weight, basis, moments, rule, remainder, projected, int8_gemm):
    for name, value, known in (
        ("weight", weight, WEIGHTS),
        ("basis", basis, BASES),
        ("moments", moments, MOMENTS),
        ("remainder", remainder, RULES),
    ):
        expect(value in known, op, lambda: f"{name} must be one of {', '.join(known)}, got {value}")
    expect(rule == RULES[remainder], op, lambda: f"rule must be {RULES[remainder]} with remainder {remainder}, got {rule}")
    expect(
        basis != "key" or remainder == "scaled-gradient",
        op,
        lambda: f"basis must be dense or int4 with remainder {remainder}, got key",
    )
    expect(not projected or remainder == "none", op, lambda: f"remainder must be none of a projected gradient, got {remainder}")
    plain = (weight, basis, moments, remainder) == ("float", "dense", "fp32", "none")
    expect(
        not int8_gemm or plain,
        op,
        lambda: f"int8_gemm must be False with weight {weight}, basis {basis}, moments {moments}, remainder {remainder}, got True",
    )


def _columns(op, name, tensors, count, least, most):
    """`tensors` as lists of `count`, one after the other; None in every place of the last where it may be absent, and is."""
    sizes = {least * count, most * count}
    wanted = " or ".join(str(size) for size in sorted(sizes))
    expect(len(tensors) in sizes, op, lambda: f"{name} must have {wanted} tensors for {count} weights, got {len(tensors)}")
    lists = [list(tensors[i : i + count]) for i in range(0, len(tensors), count)] if count else [[]] * most
    return lists + [[None] * count] * (most - len(lists))


def matrices(
    op,
    weights,
    weight_scales,
    gradients,
    bases,
    basis_parts,
    states,
    steps,
    *,
    weight,
    basis,
    moments,
    remainder,
    parameters,
    offsets,
    stochastic=False,
):
    """The lists of a step as a list of `Matrix`; the lengths must fit."""
    count, int8 = len(weights), weight == "int8"
    draws = int8 or stochastic
    for name, tensors, size in (
        ("weight_scales", weight_scales, count if int8 else 0),
        ("gradients", gradients, count),
        ("bases", bases, count),
        ("steps", steps, count),
    ):
        expect(len(tensors) == size, op, lambda: f"{name} must have {size} tensors for {count} weights, got {len(tensors)}")
    parts = len(BASES[basis])
    *parts, grams = _columns(op, "basis_parts", basis_parts, count, parts, parts + (remainder == "scaled-residual")) + (
        [] if remainder == "scaled-residual" else [[None] * count]
    )
    scales, offs = parts or [[None] * count] * 2
    size = len(MOMENTS[moments])
    *kept, limiters = _columns(op, "states", states, count, size, size + (remainder in LIMITED)) + (
        [] if remainder in LIMITED else [[None] * count]
    )
    if draws:
        check_numbers(op, count, parameters, offsets)
    return [
        Matrix(*row, moments=tuple(its), limiter=limiter, step=step, parameter=parameter, offset=offset)
        for *row, its, limiter, step, parameter, offset in zip(
            weights,
            weight_scales if int8 else [None] * count,
            gradients,
            bases,
            scales,
            offs,
            grams,
            zip(*kept) if count else [],
            limiters,
            steps,
            parameters if draws else [0] * count,
            offsets if draws and offsets else [0] * count,
        )
    ]


def check_matrix(op, x, *, weight, basis, moments, left, projected, group_size, basis_group_size, stochastic=False):
    """The rules of one matrix."""
    device = x.weight.device
    if weight == "int8":
        expect_int8(op, x.weight, x.weight_scale, group_size, "weight_scale")
    else:
        expect_matrix(op, "param", x.weight)
    if not projected:
        expect_float(op, "grad", x.gradient)
        expect_like(op, "grad", x.gradient, x.weight.shape, device)
    if basis == "dense":
        expect_basis(op, x.weight, x.basis, left)
    elif basis == "int4":
        names = ("basis", *BASES["int4"])
        expect_int4(op, x.basis, x.basis_scale, x.basis_offset, x.weight.shape[0 if left else 1], basis_group_size, device, names)
    else:
        expect_like(op, "basis", x.basis, (4,), device)
        expect_dtype(op, "basis", x.basis, torch.int64)
        exp_avg, wanted = x.moments[0], "(r, n)" if left else "(m, r)"
        expect(exp_avg.dim() == 2, op, lambda: f"exp_avg must be a matrix {wanted}, got shape {tuple(exp_avg.shape)}")
        r = exp_avg.shape[0 if left else 1]
        expect(r >= 1, op, lambda: f"rank must be at least 1, got exp_avg of shape {tuple(exp_avg.shape)}")
    r = rank_of(x.basis, basis, x.moments[0], left)
    shape = low_rank_shape(x.weight, r, left)
    fp32 = {"low_rank_grad": (x.gradient, shape)} if projected else {}
    if moments == "fp32":
        fp32 |= dict(zip(MOMENTS["fp32"], ((moment, shape) for moment in x.moments)))
    for name, (tensor, size) in fp32.items():
        expect_like(op, name, tensor, size, device)
        expect_dtype(op, name, tensor, torch.float32)
    if moments == "8bit":
        expect_moments(op, x.moments, shape, device)
    if x.gram is not None:
        expect_like(op, "gram", x.gram, (r, r), device)
        expect_dtype(op, "gram", x.gram, torch.float32)
    if x.limiter is not None:
        expect_scalar(op, "limiter", x.limiter, device, own_device=True)
        expect_dtype(op, "limiter", x.limiter, torch.float32)
    if weight == "int8" or stochastic:
        expect_stream(op, x.parameter, x.offset)


def check_step(
    weights,
    *lists,
    lr,
    weight,
    basis,
    moments,
    rule,
    remainder,
    left,
    projected=False,
    int8_gemm=False,
    advance=True,
    group_size=256,
    basis_group_size=256,
    stochastic=False,
    parameters=(),
    offsets=(),
    grad_scale=None,
    found_inf=None,
    skipped=None,
    op="step",
    **hyper,
):
    """The rules of a whole step, which returns its matrices."""
    check_policies(
        op, weight=weight, basis=basis, moments=moments, rule=rule, remainder=remainder, projected=projected, int8_gemm=int8_gemm
    )
    policies = {"weight": weight, "basis": basis, "moments": moments}
    numbers = {"parameters": parameters, "offsets": offsets, "stochastic": stochastic}
    rows = matrices(op, weights, *lists, **policies, remainder=remainder, **numbers)
    check_guards(op, weights, lists[-1], lr, grad_scale, found_inf, skipped, first="weights", counted=advance)
    for i, row in enumerate(rows):
        at = op if len(rows) == 1 else f"{op}: matrix {i}"
        check_matrix(
            at, row, **policies, left=left, projected=projected, group_size=group_size, basis_group_size=basis_group_size,
            stochastic=stochastic,
        )  # fmt: skip
    return rows


define(SCHEMAS)


@fake("step")
def _(*lists, **options):
    check_step(*lists, **options)


def check_rows(
    weights, gradients, indices, row_scales, exp_avgs, exp_avg_sqs, steps, *, lr, left, advance=True, stochastic=False,
    parameters=(), offsets=(), grad_scale=None, found_inf=None, skipped=None, op="step", **hyper,
):  # fmt: skip
    """The rules of a step on rows; returns its matrices: weight, gradient, indices, scale or None, moments and step of each."""
    count = len(weights)
    for name, tensors in (
        ("gradients", gradients),
        ("indices", indices),
        *((("row_scales", row_scales),) if row_scales else ()),
        ("exp_avgs", exp_avgs),
        ("exp_avg_sqs", exp_avg_sqs),
        ("steps", steps),
    ):
        expect(len(tensors) == count, op, lambda: f"{name} must have {count} tensors for {count} weights, got {len(tensors)}")
    if stochastic:
        check_numbers(op, count, parameters, offsets)
    check_guards(op, weights, steps, lr, grad_scale, found_inf, skipped, first="weights", counted=advance)
    rows = list(zip(weights, gradients, indices, row_scales or [None] * count, exp_avgs, exp_avg_sqs, steps))
    for i, (weight, gradient, index, row_scale, *moments, _) in enumerate(rows):
        at = op if count == 1 else f"{op}: matrix {i}"
        device = weight.device
        expect_matrix(at, "param", weight)
        expect_float(at, "grad", gradient)
        expect_like(at, "grad", gradient, weight.shape, device)
        expect_indices(at, index, device)
        expect_row_scale(at, "row_scale", row_scale, index)
        for name, moment in zip(MOMENTS["fp32"], moments):
            expect_like(at, name, moment, selected_shape(weight, index, left), device)
            expect_dtype(at, name, moment, torch.float32)
        if stochastic:
            expect_stream(at, parameters[i], offsets[i] if offsets else 0)
    return rows


@fake("step.rows")
def _(*lists, **options):
    check_rows(*lists, **options)


def _basis_scratch(x, kind, matrix, left):
    """Of a product with a matrix of this shape: the basis in fp32, or the part of it that is made at once."""
    d, r = matrix[0 if left else 1], rank_of(x.basis, kind, x.moments[0], left)
    if kind == "dense":
        return copy_unless_fp32(x.basis)
    return int4_panel(d, r) if kind == "int4" else fp32(min(d, max(64, (1 << 17) // r // 64 * 64)), r)  # csrc/ops/cpu/gaussian.cpp


@workspace("step")
def _(
    *lists, weight, basis, moments, remainder, left, projected=False, int8_gemm=False, parameters=(), offsets=(), cuda=False, **_
):  # fmt: skip
    policies = {"weight": weight, "basis": basis, "moments": moments, "remainder": remainder}
    rows = [x for x in matrices("step", *lists, **policies, parameters=parameters, offsets=offsets) if x.weight.numel()]
    back, residual = remainder != "scaled-gradient", remainder in ("scaled-residual", "state-free")
    low_rank = [fp32(*x.moments[0].shape) for x in rows]
    if cuda:
        return max((_on_gpu(x, basis, moments, remainder, left, projected) for x in rows), default=0)
    if int8_gemm:  # R or the update; the basis quantised one way, then the other; the update quantised
        shapes = [(*x.basis.shape, x.moments[0].numel() // x.basis.shape[1]) for x in rows]
        return (
            reused(low_rank)
            + reused(size for d, r, _ in shapes for size in (int8_operand(r, d), int8_operand(d, r)))
            + reused(int8_operand(channels, r) for _, r, channels in shapes)
            + max((int8_panels(r) for _, r, _ in shapes), default=0)
        )
    of_weight = int8_tile_shape if weight == "int8" else tile_shape
    tiles, panels = [], []
    for x in rows:
        shape = x.weight.shape
        if not projected:
            tiles.append(tile_unless_fp32(x.gradient))
            whole = x.gradient.dtype == torch.float32 or basis == "key"
            panels.append(_basis_scratch(x, basis, shape if whole else tile_shape(*shape), left))
        if back:
            straight = not residual and x.weight.dtype == torch.float32  # the product goes into the weight
            tiles.append(0 if straight else fp32(*of_weight(*shape)))
            panels.append(_basis_scratch(x, basis, of_weight(*shape), left))
    # R, and the update beside it; panels or copies of bases; a tile of the gradient, then of the weight, and of back(R) for a sign
    again = reused(low_rank) * residual + reused(fp32(*of_weight(*x.weight.shape)) for x in rows) * (remainder == "state-free")
    return reused(low_rank) + again + reused(tiles) + reused(panels)


def _on_gpu(x, basis, moments, remainder, left, projected):
    """R, the update, and the parts of a split product; with ratios, five numbers a channel."""
    entries = x.moments[0].numel()
    parts = 0 if projected else split_parts(x.gradient, entries)
    if remainder == "none":  # the update is in the basis' type; with moments in fp32, R exists in registers only
        fused = projected or moments == "fp32"
        update = entries * (x.basis.element_size() if basis == "dense" else 4)
        return launched_together(*x.weight.shape) * (update + 4 * entries * (not fused)) + parts
    # R, the update where it is applied, (BᵀB)R, and a Gaussian basis
    low_rank = 1 + (remainder != "scaled-gradient") + (x.gram is not None and x.limiter is not None)
    made = fp32(x.weight.shape[0 if left else 1], rank_of(x.basis, basis, x.moments[0], left)) if basis == "key" else 0
    return low_rank * 4 * entries + made + parts + fp32(5, x.weight.shape[1 if left else 0]) * (remainder in LIMITED)
