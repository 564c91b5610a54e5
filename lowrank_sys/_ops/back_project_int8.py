"""Back-projection into INT8 weights, written in place with stochastic rounding (Q-GaLore).

A weight (m, n) is codes (m, n) int8 with a scale a group, as in `int8`. A basis is a matrix, or with basis_scale and basis_offset
the packed codes of `quantize_int4`.
"""

import torch

from lowrank_sys._ops.int4 import expect_int4
from lowrank_sys._ops.int8 import check_int8_numbers, expect_int8, expect_stream
from lowrank_sys._ops.rules import define, expect, expect_basis, expect_dtype, expect_like, fake
from lowrank_sys._ops.workspace import copy_unless_fp32, fp32, int4_panel, int8_tile_shape, workspace

_BACK = (
    "(Tensor(a!) codes, Tensor(b!) scale, Tensor low_rank, Tensor basis, Tensor? basis_scale=None, Tensor? basis_offset=None, *, "
)
_STREAM = "SymInt offset=0, int group_size=256, int basis_group_size=256"

SCHEMAS = {
    # W <- decay W + alpha back(X), rounded stochastically.
    "back_project_int8_.tensor": f"{_BACK}Tensor alpha, Tensor decay, bool left, int seed, Tensor step, int parameter, {_STREAM}) "
    "-> ()",
    "back_project_int8_": f"{_BACK}float alpha=1.0, float decay=1.0, bool left, int seed, SymInt step, int parameter, {_STREAM}) "
    "-> ()",
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


def _back_panel(codes, r, left):
    return int4_panel(int8_tile_shape(*codes.shape)[0 if left else 1], r)


@workspace("back_project_int8_", "back_project_int8_.tensor")
def _(codes, scale, low_rank, basis, basis_scale=None, basis_offset=None, *, left, cuda=False, **_):
    if cuda or codes.numel() == 0:
        return 0
    panel = copy_unless_fp32(basis) if basis_scale is None else _back_panel(codes, basis.shape[0], left)
    return fp32(*int8_tile_shape(*codes.shape)) + panel
