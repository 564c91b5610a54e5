"""Q-GaLore: low-rank steps whose weights are INT8, written in place with stochastic rounding.

A weight (m, n) is codes (m, n) int8 with a scale a group, as in `int8`. A basis is a matrix, or with basis_scale and basis_offset
the packed codes of `quantize_int4`; in the list forms all bases are INT4, or none where both lists are empty.
"""

import torch

from lowrank_sys._ops.blockwise import expect_moments
from lowrank_sys._ops.int4 import expect_int4
from lowrank_sys._ops.int8 import check_int8_numbers, expect_int8, expect_stream
from lowrank_sys._ops.rules import (
    ADAM,
    GUARDS,
    check_guards,
    check_lists,
    check_step_and_rate,
    define,
    expect,
    expect_basis,
    expect_dtype,
    expect_float,
    expect_like,
    fake,
)
from lowrank_sys._ops.workspace import (
    copy_unless_fp32,
    fp32,
    int4_panel,
    int4_panel_of,
    int8_tile_shape,
    launched_together,
    reused,
    split_parts,
    tile_unless_fp32,
    workspace,
)

_BACK = (
    "(Tensor(a!) codes, Tensor(b!) scale, Tensor low_rank, Tensor basis, Tensor? basis_scale=None, Tensor? basis_offset=None, *, "
)
_STREAM = "SymInt offset=0, int group_size=256, int basis_group_size=256"
_LIST_STREAM = "int seed, int[] parameters, int[] offsets=[], int group_size=256, int basis_group_size=256"
_BASIS = "Tensor basis, Tensor? basis_scale, Tensor? basis_offset"
_BASES = "Tensor[] bases, Tensor[] basis_scales, Tensor[] basis_offsets"
_MOMENTS = "Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, Tensor(e!) exp_avg_absmax, Tensor(f!) exp_avg_sq_absmax"
_MOMENT_LISTS = "Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] exp_avg_absmaxes, Tensor(f!)[] exp_avg_sq_absmaxes"


def _step_schemas(name, gradient):
    """The tensor overload comes first: a 0-dim tensor given to an int argument would be accepted through .item()."""
    one = f"(Tensor(a!) codes, Tensor(b!) weight_scale, Tensor {gradient}, {_BASIS}, {_MOMENTS}, *, "
    many = f"(Tensor(a!)[] codes, Tensor(b!)[] weight_scales, Tensor[] {gradient}s, {_BASES}, {_MOMENT_LISTS}, "
    hyper = f"{ADAM}, float scale, bool left"
    return {
        f"{name}.tensor": f"{one}Tensor step, Tensor lr, {hyper}, int seed, int parameter, {_STREAM}) -> ()",
        name: f"{one}SymInt step, float lr, {hyper}, int seed, int parameter, {_STREAM}) -> ()",
        f"{name}.list": f"{many}Tensor(g!)[] steps, *, Tensor lr, {hyper}, {_LIST_STREAM}, {GUARDS}) -> ()",
    }


SCHEMAS = {
    # W <- decay W + alpha back(X), rounded stochastically.
    "back_project_int8_.tensor": f"{_BACK}Tensor alpha, Tensor decay, bool left, int seed, Tensor step, int parameter, {_STREAM}) "
    "-> ()",
    "back_project_int8_": f"{_BACK}float alpha=1.0, float decay=1.0, bool left, int seed, SymInt step, int parameter, {_STREAM}) "
    "-> ()",
    # galore_step_8bit on INT8 weights, and the same from a gradient that is already projected.
    **_step_schemas("qgalore_step", "grad"),
    **_step_schemas("qgalore_subspace_step", "low_rank_grad"),
}


def rank_of(basis, basis_scale):
    return basis.shape[1 if basis_scale is None else 0]


def low_rank_shape(codes, basis, basis_scale, left):
    """Shape of R for a weight of codes' shape."""
    r = rank_of(basis, basis_scale)
    return (r, codes.shape[1]) if left else (codes.shape[0], r)


def expect_any_basis(op, codes, basis, basis_scale, basis_offset, left, basis_group_size):
    expect((basis_scale is None) == (basis_offset is None), op, lambda: "basis_scale and basis_offset must be given together")
    if basis_scale is None:
        expect_basis(op, codes, basis, left)
    else:
        expect_int4(
            op,
            basis,
            basis_scale,
            basis_offset,
            codes.shape[0 if left else 1],
            basis_group_size,
            codes.device,
            ("basis", "basis_scale", "basis_offset"),
        )


def _expect_low_rank(op, name, tensor, shape, device):
    expect_like(op, name, tensor, shape, device)
    expect_dtype(op, name, tensor, torch.float32)


def check_back_project_int8(
    codes,
    scale,
    low_rank,
    basis,
    basis_scale=None,
    basis_offset=None,
    *,
    alpha,
    decay,
    left,
    step,
    parameter,
    offset,
    group_size,
    basis_group_size,
    op="back_project_int8_",
):
    expect_int8(op, codes, scale, group_size)
    expect_any_basis(op, codes, basis, basis_scale, basis_offset, left, basis_group_size)
    _expect_low_rank(op, "low_rank", low_rank, low_rank_shape(codes, basis, basis_scale, left), codes.device)
    check_int8_numbers(op, codes.device, alpha, decay, step)
    expect_stream(op, parameter, offset)


def check_qgalore(
    op,
    codes,
    weight_scale,
    gradient,
    basis,
    basis_scale,
    basis_offset,
    *moments,
    projected,
    left,
    parameter,
    offset,
    group_size,
    basis_group_size,
):
    """The rules of one matrix; `projected` says whether the gradient is R."""
    expect_int8(op, codes, weight_scale, group_size, "weight_scale")
    if not projected:
        expect_float(op, "grad", gradient)
        expect_like(op, "grad", gradient, codes.shape, codes.device)
    expect_any_basis(op, codes, basis, basis_scale, basis_offset, left, basis_group_size)
    shape = low_rank_shape(codes, basis, basis_scale, left)
    if projected:
        _expect_low_rank(op, "low_rank_grad", gradient, shape, codes.device)
    expect_moments(op, moments, shape, codes.device)
    expect_stream(op, parameter, offset)


def expect_numbers(op, name, numbers, count):
    """A list of integers, one a matrix."""
    expect(len(numbers) == count, op, lambda: f"{name} must have {count} numbers, one for each of codes, got {len(numbers)}")


def or_none(tensors, count):
    """An optional list: None in every place of an empty one."""
    return tensors if tensors else [None] * count


def check_qgalore_list(
    op,
    codes,
    weight_scales,
    gradients,
    bases,
    basis_scales,
    basis_offsets,
    *moments_and_steps,
    projected,
    lr,
    left,
    parameters,
    offsets,
    group_size,
    basis_group_size,
    guards,
):
    """The rules of a list form; returns the matrices, each a tuple with its parameter and offset at the end."""
    *moments, steps = moments_and_steps
    names = ("exp_avgs", "exp_avg_sqs", "exp_avg_absmaxes", "exp_avg_sq_absmaxes")
    scales = {"basis_scales": basis_scales, "basis_offsets": basis_offsets} if basis_scales or basis_offsets else {}
    check_lists(
        op,
        codes=codes,
        weight_scales=weight_scales,
        **{"low_rank_grads" if projected else "grads": gradients},
        bases=bases,
        **scales,
        **dict(zip(names, moments)),
        steps=steps,
    )
    count = len(codes)
    expect_numbers(op, "parameters", parameters, count)
    if offsets:
        expect_numbers(op, "offsets", offsets, count)
    check_guards(op, codes, steps, lr, *guards, first="codes")
    rows = list(
        zip(
            codes,
            weight_scales,
            gradients,
            bases,
            or_none(basis_scales, count),
            or_none(basis_offsets, count),
            *moments,
            parameters,
            offsets or [0] * count,
        )
    )
    for *tensors, parameter, offset in rows:
        check_qgalore(
            op,
            *tensors,
            projected=projected,
            left=left,
            parameter=parameter,
            offset=offset,
            group_size=group_size,
            basis_group_size=basis_group_size,
        )
    return rows


define(SCHEMAS)


def _back_fake(
    codes,
    scale,
    low_rank,
    basis,
    basis_scale=None,
    basis_offset=None,
    *,
    alpha=1.0,
    decay=1.0,
    left,
    seed,
    step,
    parameter,
    offset=0,
    group_size=256,
    basis_group_size=256,
):
    check_back_project_int8(
        codes,
        scale,
        low_rank,
        basis,
        basis_scale,
        basis_offset,
        alpha=alpha,
        decay=decay,
        left=left,
        step=step,
        parameter=parameter,
        offset=offset,
        group_size=group_size,
        basis_group_size=basis_group_size,
    )


fake("back_project_int8_.tensor")(_back_fake)
fake("back_project_int8_")(_back_fake)


def _one_fake(op, projected):
    def one(
        *tensors,
        step,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        scale,
        left,
        seed,
        parameter,
        offset=0,
        group_size=256,
        basis_group_size=256,
    ):
        check_qgalore(
            op,
            *tensors,
            projected=projected,
            left=left,
            parameter=parameter,
            offset=offset,
            group_size=group_size,
            basis_group_size=basis_group_size,
        )
        check_step_and_rate(op, tensors[0].device, step, lr)

    return one


def _list_fake(op, projected):
    def many(
        *lists,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        scale,
        left,
        seed,
        parameters,
        offsets=(),
        group_size=256,
        basis_group_size=256,
        grad_scale=None,
        found_inf=None,
        skipped=None,
    ):
        check_qgalore_list(
            op,
            *lists,
            projected=projected,
            lr=lr,
            left=left,
            parameters=parameters,
            offsets=offsets,
            group_size=group_size,
            basis_group_size=basis_group_size,
            guards=(grad_scale, found_inf, skipped),
        )

    return many


for _name, _projected in (("qgalore_step", False), ("qgalore_subspace_step", True)):
    fake(f"{_name}.tensor")(_one_fake(_name, _projected))
    fake(_name)(_one_fake(_name, _projected))
    fake(f"{_name}.list")(_list_fake(_name, _projected))


def _back_panel(codes, r, left):
    return int4_panel(int8_tile_shape(*codes.shape)[0 if left else 1], r)


@workspace("back_project_int8_", "back_project_int8_.tensor")
def _(codes, scale, low_rank, basis, basis_scale=None, basis_offset=None, *, left, cuda=False, **_):
    if cuda or codes.numel() == 0:
        return 0
    panel = copy_unless_fp32(basis) if basis_scale is None else _back_panel(codes, basis.shape[0], left)
    return fp32(*int8_tile_shape(*codes.shape)) + panel


def _step_scratch(matrices, projected, left, cuda):
    """matrices: (codes, gradient, basis, its scale or None, exp_avg)."""
    if cuda:  # R, the update in the basis' type, and the parts of a split product
        return max(
            (
                launched_together(*codes.shape)
                * exp_avg.numel()
                * ((0 if projected else 4) + (basis.element_size() if scale is None else 4))
                + (0 if projected else split_parts(gradient, exp_avg.numel()))
                for codes, gradient, basis, scale, exp_avg in matrices
            ),
            default=0,
        )
    tiles, panels = [], []
    for codes, gradient, basis, scale, _ in matrices:
        if codes.numel() == 0:
            continue
        r = rank_of(basis, scale)
        if not projected:
            tiles.append(tile_unless_fp32(gradient))
            panels.append(0 if scale is None else int4_panel_of(gradient, r, left))
        tiles.append(fp32(*int8_tile_shape(*codes.shape)))
        panels.append(0 if scale is None else _back_panel(codes, r, left))
    return (
        reused(fp32(*exp_avg.shape) for *_, exp_avg in matrices)
        + reused(tiles)
        + reused(panels)
        + reused(copy_unless_fp32(basis) for _, _, basis, scale, _ in matrices if scale is None)
    )


def _scratch_of(projected):
    def scratch(codes, weight_scales, gradients, bases, basis_scales, basis_offsets, exp_avgs, *_, left, cuda=False, **__):
        if isinstance(codes, torch.Tensor):
            matrices = [(codes, gradients, bases, basis_scales, exp_avgs)]
        else:
            matrices = list(zip(codes, gradients, bases, or_none(basis_scales, len(codes)), exp_avgs))
        return _step_scratch(matrices, projected, left, cuda)

    return scratch


for _name, _projected in (("qgalore_step", False), ("qgalore_subspace_step", True)):
    workspace(_name, f"{_name}.tensor", f"{_name}.list")(_scratch_of(_projected))
