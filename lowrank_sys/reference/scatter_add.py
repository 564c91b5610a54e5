"""SLTrain (Han et al. 2024, arXiv:2406.02214): a weight W = scale B A + S, low-rank plus sparse on a fixed random support."""

import torch

from lowrank_sys import _ops


def scatter_add_product(b, a, values, columns, *, scale=1.0, dtype=None):
    """W (m, n) = scale B A + S in `dtype`, or B's; S[i, columns[i, j]] = values[i, j].

    b (m, r), a (r, n) and values (m, k) are fp32 | bf16 | fp16; columns (m, k) int32 rise in each row. Products and sums are fp32.
    """
    if b.dtype != torch.float64:
        _ops.scatter_add.check_scatter_add_product(b, a, values, columns, dtype=dtype)
        _ops.scatter_add.check_columns(columns, a.shape[1])
    wide = torch.promote_types(b.dtype, torch.float32)
    w = scale * (b.to(wide) @ a.to(wide))
    return w.scatter_add(1, columns.long(), values.to(wide)).to(dtype or b.dtype)
