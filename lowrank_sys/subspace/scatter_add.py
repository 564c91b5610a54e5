"""W = scale B A + S where no kernel serves it: torch's product, and its scatter into the result."""

import torch

from lowrank_sys import _ops


def scatter_add_product(b, a, values, columns, *, scale=1.0, dtype=None):
    """W (m, n) = scale B A + S, as the oracle's; one fp32 matrix of W's size where the result is not fp32."""
    _ops.scatter_add.check_scatter_add_product(b, a, values, columns, dtype=dtype)
    _ops.scatter_add.check_columns(columns, a.shape[1])
    w = torch.mm(b.float(), a.float()).mul_(scale)
    w.scatter_add_(1, columns.long(), values.float())
    return w.to(dtype or b.dtype)
