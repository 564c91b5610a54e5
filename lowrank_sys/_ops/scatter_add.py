"""The weight of a layer that is low-rank plus sparse: a product of two factors with a scatter-add behind it."""

import torch

from lowrank_sys._ops.rules import FLOATS, define, expect, expect_dtype, expect_like, expect_matrix, fake
from lowrank_sys._ops.workspace import copy_unless_fp32, tile, workspace

SCHEMAS = {
    # W = scale B A + S, S with as many entries in each row.
    "scatter_add_product": "(Tensor b, Tensor a, Tensor values, Tensor columns, *, float scale=1.0, ScalarType? dtype=None) -> "
    "Tensor"
}


def check_scatter_add_product(b, a, values, columns, *, dtype, op="scatter_add_product"):
    for name, tensor in (("b", b), ("a", a), ("values", values)):
        expect_matrix(op, name, tensor)
    m, r = b.shape
    n, k = a.shape[1], values.shape[1]
    expect(r >= 1, op, lambda: f"rank must be at least 1, got b of shape {tuple(b.shape)}")
    expect_like(op, "a", a, (r, n), b.device)
    expect_like(op, "values", values, (m, k), b.device)
    expect(k <= n, op, lambda: f"values must have at most n = {n} columns, got shape {tuple(values.shape)}")
    expect_like(op, "columns", columns, (m, k), b.device)
    expect_dtype(op, "columns", columns, torch.int32)
    expect(dtype is None or dtype in FLOATS, op, lambda: f"dtype must be float32, bfloat16 or float16, got {dtype}")


def check_columns(columns, n, op="scatter_add_product"):
    """On the CPU, the columns of a row rise and are in [0, n): a RuntimeError names the first that is not.

    Elsewhere reading them would wait for the device; there an entry outside of W is left out.
    """
    if columns.device.type != "cpu" or columns.numel() == 0:
        return
    before = torch.nn.functional.pad(columns[:, :-1], (1, 0), value=-1)
    right = (columns > before) & (columns < n)
    if not right.all():
        i, j = (~right).nonzero()[0].tolist()
        expect(False, op, lambda: f"columns[{i}, {j}] must be in [{before[i, j] + 1}, {n}), got {columns[i, j]}")


define(SCHEMAS)


@fake("scatter_add_product")
def _(b, a, values, columns, *, scale=1.0, dtype=None):
    check_scatter_add_product(b, a, values, columns, dtype=dtype)
    return b.new_empty((b.shape[0], a.shape[1]), dtype=dtype or b.dtype)


@workspace("scatter_add_product")
def _(b, a, values, columns, *, scale=1.0, dtype=None, cuda=False):
    direct = (dtype or b.dtype) == torch.float32 and scale != 0
    return 0 if cuda else copy_unless_fp32(b) + copy_unless_fp32(a) + (0 if direct else tile(b.shape[0], a.shape[1]))
