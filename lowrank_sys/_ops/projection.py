"""Products with a basis, and the norms of channels."""

import torch

from lowrank_sys._ops.rules import define, expect_basis, expect_dtype, expect_like, expect_matrix, fake, low_rank_shape
from lowrank_sys._ops.workspace import copy_unless_fp32, int8_operand, int8_panels, split_parts, tile_unless_fp32, workspace

SCHEMAS = {
    "project": "(Tensor grad, Tensor basis, *, bool left, bool int8_gemm=False) -> Tensor",
    "back_project_": "(Tensor(a!) param, Tensor low_rank, Tensor basis, *, float alpha=1.0, float beta=1.0, bool left, "
    "bool int8_gemm=False) -> ()",
    "channel_norms": "(Tensor grad, *, bool left) -> Tensor",
}


def check_project(grad, basis, *, left, op="project"):
    expect_matrix(op, "grad", grad)
    expect_basis(op, grad, basis, left)


def check_back_project(param, low_rank, basis, *, left, op="back_project_"):
    expect_matrix(op, "param", param)
    expect_basis(op, param, basis, left)
    expect_like(op, "low_rank", low_rank, low_rank_shape(param, basis, left), param.device)
    expect_dtype(op, "low_rank", low_rank, torch.float32)


def check_channel_norms(grad, *, op="channel_norms"):
    expect_matrix(op, "grad", grad)


define(SCHEMAS)


@fake("project")
def _(grad, basis, *, left, int8_gemm=False):
    check_project(grad, basis, left=left)
    return grad.new_empty(low_rank_shape(grad, basis, left), dtype=torch.float32)


@fake("back_project_")
def _(param, low_rank, basis, *, alpha=1.0, beta=1.0, left, int8_gemm=False):
    check_back_project(param, low_rank, basis, left=left)


@fake("channel_norms")
def _(grad, *, left):
    check_channel_norms(grad)
    return grad.new_empty(grad.shape[1 if left else 0], dtype=torch.float32)


@workspace("project", "back_project_")
def _(matrix, *operands, left, int8_gemm=False, cuda=False, **_):
    if cuda:
        return split_parts(matrix, operands[-1].shape[1] * matrix.shape[1 if left else 0])
    if int8_gemm:
        d, r = operands[-1].shape
        if len(operands) == 1:
            return int8_operand(r, d) + int8_panels(r)
        return int8_operand(d, r) + int8_operand(operands[0].numel() // r, r) + int8_panels(r)
    return copy_unless_fp32(operands[-1]) + tile_unless_fp32(matrix)


@workspace("channel_norms")
def _(grad, *, left, cuda=False):
    return 0
