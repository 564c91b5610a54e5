"""Low-rank plus sparse: the product within what fp32 may be off by, entries of S exactly where they belong."""

import torch

from cases.bounds import Near, added, assert_within, exact, product, scaled
from cases.case import Case
from cases.draw import FLOATS


def support(draw, m, n, k):
    """k rising columns of n in each of m rows."""
    generator = torch.Generator().manual_seed(draw.integer(0, 99))
    return torch.rand(m, n, generator=generator).argsort(1)[:, :k].sort(1).values.int()


def arguments(draw):
    m, n, r = draw.size(), draw.size(), draw.size(1, 64)
    k = draw.of(*{min(k, n): None for k in (2, 0, 9, 300)})
    return dict(
        b=draw.values(m, r, dtype=draw.of(*FLOATS)),
        a=draw.values(r, n, dtype=draw.of(*FLOATS)),
        values=draw.values(m, k, dtype=draw.of(*FLOATS)),
        columns=support(draw, m, n, k),
        scale=draw.of(1.0, 0.25, -2.0),
        dtype=draw.of(None, *FLOATS),
    )


def near(args):
    """W with its bound."""
    columns, values = args["columns"].long(), exact(args["values"])
    zeros = torch.zeros(columns.shape[0], args["a"].shape[1], dtype=torch.float64)
    sparse = Near(zeros.scatter(1, columns, values.value), zeros.scatter(1, columns, values.error))
    return added(scaled(args["scale"], product(exact(args["b"]), exact(args["a"]))), sparse)


def compare(before, after, result):
    assert result.dtype == (before["dtype"] or before["b"].dtype) and result.is_contiguous()
    assert_within("result", result, near(before))


CASES = {"scatter_add_product": Case(arguments, compare, values="columns")}
