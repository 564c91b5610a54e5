"""A basis in INT4: 4-bit codes in groups of consecutive entries of one basis vector, each with its own scale and offset.

A basis (d, r) is stored vector by vector: packed (r, ⌈d/2⌉) uint8, entry 2i of a vector in the low nibble of byte i and entry
2i + 1 in the high one (0 where d is odd); scale and offset (r, ⌈d/group_size⌉) fp32. An entry is offset + scale * code.
"""

import torch

from lowrank_sys._ops.rules import define, expect, expect_dtype, expect_group_size, expect_like, expect_matrix, fake
from lowrank_sys._ops.workspace import int4_panel_of, split_parts, tile_unless_fp32, workspace

INT4 = "Tensor packed, Tensor scale, Tensor offset"
SCHEMAS = {
    "quantize_int4": "(Tensor basis, *, int group_size=256) -> (Tensor packed, Tensor scale, Tensor offset)",
    "dequantize_int4": f"({INT4}, *, SymInt d, int group_size=256) -> Tensor",
    "project_int4": f"(Tensor grad, {INT4}, *, bool left, int group_size=256) -> Tensor",
    "back_project_int4_": f"(Tensor(a!) param, Tensor low_rank, {INT4}, *, float alpha=1.0, float beta=1.0, bool left, "
    "int group_size=256) -> ()",
}


def cdiv(a, b):
    return (a + b - 1) // b


def int4_shapes(d, r, group_size):
    """Shapes of packed, and of scale and offset."""
    return (r, cdiv(d, 2)), (r, cdiv(d, group_size))


def check_quantize_int4(basis, *, group_size, op="quantize_int4"):
    expect_matrix(op, "basis", basis)
    expect(basis.shape[1] >= 1, op, lambda: f"rank must be at least 1, got basis of shape {tuple(basis.shape)}")
    expect_group_size(op, group_size)


def expect_int4(op, packed, scale, offset, d, group_size, device, names=("packed", "scale", "offset")):
    """packed, scale and offset, which the op calls `names`, are a basis (d, r) on `device`."""
    expect_group_size(op, group_size)
    expect(
        packed.dim() == 2 and packed.shape[1] == cdiv(d, 2),
        op,
        lambda: f"{names[0]} must have shape (r, {cdiv(d, 2)}) for vectors of {d} entries, got {tuple(packed.shape)}",
    )
    expect(packed.shape[0] >= 1, op, lambda: f"rank must be at least 1, got {names[0]} of shape {tuple(packed.shape)}")
    expect_dtype(op, names[0], packed, torch.uint8)
    expect_like(op, names[0], packed, packed.shape, device)
    shape = int4_shapes(d, packed.shape[0], group_size)[1]
    for name, tensor in zip(names[1:], (scale, offset)):
        expect_like(op, name, tensor, shape, device)
        expect_dtype(op, name, tensor, torch.float32)


def check_dequantize_int4(packed, scale, offset, *, d, group_size, op="dequantize_int4"):
    expect(d >= 0, op, lambda: f"d must be at least 0, got {d}")
    expect_int4(op, packed, scale, offset, d, group_size, packed.device)


def int4_low_rank_shape(matrix, packed, left):
    """Shape of R = project(matrix, basis) for a basis of packed.shape[0] vectors."""
    return (packed.shape[0], matrix.shape[1]) if left else (matrix.shape[0], packed.shape[0])


def check_project_int4(grad, packed, scale, offset, *, left, group_size, op="project_int4"):
    expect_matrix(op, "grad", grad)
    expect_int4(op, packed, scale, offset, grad.shape[0 if left else 1], group_size, grad.device)


def check_back_project_int4(param, low_rank, packed, scale, offset, *, left, group_size, op="back_project_int4_"):
    expect_matrix(op, "param", param)
    expect_int4(op, packed, scale, offset, param.shape[0 if left else 1], group_size, param.device)
    expect_like(op, "low_rank", low_rank, int4_low_rank_shape(param, packed, left), param.device)
    expect_dtype(op, "low_rank", low_rank, torch.float32)


define(SCHEMAS)


@fake("quantize_int4")
def _(basis, *, group_size=256):
    check_quantize_int4(basis, group_size=group_size)
    codes, scales = int4_shapes(*basis.shape, group_size)
    return (
        basis.new_empty(codes, dtype=torch.uint8),
        basis.new_empty(scales, dtype=torch.float32),
        basis.new_empty(scales, dtype=torch.float32),
    )


@fake("dequantize_int4")
def _(packed, scale, offset, *, d, group_size=256):
    check_dequantize_int4(packed, scale, offset, d=d, group_size=group_size)
    return scale.new_empty(d, packed.shape[0])


@fake("project_int4")
def _(grad, packed, scale, offset, *, left, group_size=256):
    check_project_int4(grad, packed, scale, offset, left=left, group_size=group_size)
    return scale.new_empty(int4_low_rank_shape(grad, packed, left))


@fake("back_project_int4_")
def _(param, low_rank, packed, scale, offset, *, alpha=1.0, beta=1.0, left, group_size=256):
    check_back_project_int4(param, low_rank, packed, scale, offset, left=left, group_size=group_size)


@workspace("quantize_int4", "dequantize_int4")
def _(*_, cuda=False, **__):
    return 0


@workspace("project_int4", "back_project_int4_")
def _(matrix, *operands, left, cuda=False, **_):
    if cuda:
        return split_parts(matrix, operands[-3].shape[0] * matrix.shape[1 if left else 0])
    return int4_panel_of(matrix, operands[-3].shape[0], left) + (tile_unless_fp32(matrix) if matrix.numel() else 0)
