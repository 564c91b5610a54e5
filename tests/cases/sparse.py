"""Structured sparse ops: selections and gathered values to the bit, the step within rounding."""

import torch

from cases.bounds import TINY, UNIT, Near, adam, exact, scaled
from cases.case import Case, assert_equal, exactly
from cases.draw import FLOATS
from cases.projection import compare_norms, low_rank, norms_arguments
from cases.rounding import places, rounding
from cases.steps import assert_step, compare_list, guards, hyper, moments, rate, settings_of, usable
from lowrank_sys import _ops
from lowrank_sys.reference import selection, sparse

INDICES = "indices"


def select_arguments(draw):
    d = draw.size(1)
    return dict(
        norms=draw.values(d),
        r=draw.of(1, d, (d + 1) // 2),
        method=draw.of(*_ops.sparse.METHODS),
        seed=draw.of(0, -1, 2**63 - 1),
        step=draw.of(0, 2**40),
        parameter=draw.of(0, 2**33),
    )


def compare_select(before, after, result):
    indices, scale = selection.select_rows(**before)
    assert_equal("indices", result[0], indices)
    torch.testing.assert_close(result[1], scale, rtol=3e-7, atol=0)  # expm1 in fp64, rounded once


def drawn_rows(draw, size, least=1):
    """(indices, scale) of distinct rows out of `size` >= 1."""
    r = draw.of(*{min(r, size): None for r in (least, 2, 9, 65)})
    generator = torch.Generator().manual_seed(draw.integer(0, 99))
    return torch.randperm(size, generator=generator)[:r].int(), draw.of(None, draw.values(r, hostile=False))


def sizes(draw, left):
    """m, n with at least one row to select."""
    return draw.size(1 if left else 0), draw.size(0 if left else 1)


def gather_arguments(draw):
    left = draw.of(True, False)
    m, n = sizes(draw, left)
    indices, scale = drawn_rows(draw, m if left else n)
    return dict(grad=draw.values(m, n, dtype=draw.of(*FLOATS)), indices=indices, scale=scale, left=left)


def scatter_arguments(draw):
    left = draw.of(True, False)
    m, n = sizes(draw, left)
    indices, scale = drawn_rows(draw, m if left else n)
    return dict(
        param=draw.values(m, n, dtype=draw.of(*FLOATS)),
        low_rank=draw.values(*low_rank(m, n, len(indices), left)),
        indices=indices,
        scale=scale,
        alpha=draw.of(1.0, -0.25, 1e-3),
        left=left,
    )


NAMES = ["param", "grad", "indices", "row_scale", "exp_avg", "exp_avg_sq"]
COLUMNS = ["params", "grads", "indices", "row_scales", "exp_avgs", "exp_avg_sqs"]


def matrix(draw, left, scaled_rows=None):
    m, n = sizes(draw, left)
    indices, scale = drawn_rows(draw, m if left else n)
    if scaled_rows is not None:
        scale = torch.linspace(0.5, 2, len(indices)) if scaled_rows else None
    return [
        draw.values(m, n, dtype=draw.of(*FLOATS)),
        draw.values(m, n, dtype=draw.of(*FLOATS)),
        indices,
        scale,
        *moments(draw, low_rank(m, n, len(indices), left)),
    ]


def one_arguments(tensor):
    def arguments(draw):
        left, step = draw.of(True, False), draw.of(1, 2, 1000, 10**6)
        kind = draw.of(torch.float32, torch.float64, torch.int64)
        return dict(zip(NAMES, matrix(draw, left))) | dict(
            step=torch.tensor(step, dtype=kind) if tensor else step,
            lr=rate(draw) if tensor else draw.of(0.1, 1e-3, 0.0),
            **hyper(draw),
            scale=draw.of(0.25, 1.0, 0.0),
            left=left,
        )

    return arguments


def list_arguments(draw):
    left, count, scaled_rows = draw.of(True, False), draw.count(), draw.of(True, False)
    columns = [list(column) for column in zip(*(matrix(draw, left, scaled_rows) for _ in range(count)))] or [[] for _ in NAMES]
    if not scaled_rows:
        columns[3] = []
    return dict(zip(COLUMNS, columns)) | dict(
        steps=[torch.tensor(float(draw.of(0, 9))) for _ in range(count)],
        lr=rate(draw),
        **hyper(draw),
        scale=draw.of(0.25, 1.0, 0.0),
        left=left,
        **guards(draw),
    )


def times(a, factors):
    """a times fp32 factors, rounded once."""
    value = a.value * factors.double()
    return Near(value, value).fits(a.error * factors.double().abs() * (1 + UNIT) + UNIT * value.abs() + TINY)


def check_matrix(before, after, left, grad_scale, settings, halves=1):
    """One matrix of a step; returns (fewest, most) weights that may have been left out."""
    param, grad, indices, row_scale, m, v = before
    axis, at = 0 if left else 1, indices.long()
    rho = torch.ones(len(indices)) if row_scale is None else row_scale
    rho = sparse.per_row(rho, left)
    r = scaled(grad_scale, times(exact(grad.index_select(axis, at)), rho), operations=1)
    sure, never = usable(r)
    sure, never = sure.all(axis, keepdim=True), never.any(axis, keepdim=True)
    new_m, new_v, update = adam(r.select(sure, torch.zeros(())), m, v, **settings)
    update = times(update.select(sure, torch.zeros(())), rho)
    zeros = torch.zeros(param.shape, dtype=torch.float64)
    scattered = Near(zeros.index_copy(axis, at, update.value), zeros.index_copy(axis, at, update.error))
    assert_step((param, m, v), (after[0], after[4], after[5]), r, (sure, never), scattered, new_m, new_v, settings, halves)
    return int(never.sum()) * param.shape[axis], int((~sure).sum()) * param.shape[axis]


def compare_one(before, after, result):
    rows = [[arguments[name] for name in NAMES] for arguments in (before, after)]
    check_matrix(*rows, before["left"], 1.0, settings_of(before, before["step"], before["lr"]))


def compare_matrices(before, after, result):
    # A list without scales, as rows.
    full = [a if a["row_scales"] else a | {"row_scales": [torch.ones(len(x)) for x in a["indices"]]} for a in (before, after)]

    def check_row(then, now, b, grad_scale, settings):
        return check_matrix(then, now, b["left"], grad_scale, settings, places(b, then[0]))

    compare_list(COLUMNS, check_row)(*full, result)


def renamed(arguments, names):
    return {names.get(name, name): value for name, value in arguments.items()}


# What step.rows calls the lists of the named step.
ROWS = {"params": "weights", "grads": "gradients"}


def rows_arguments(draw):
    arguments = renamed(list_arguments(draw), ROWS)
    return arguments | dict(advance=True, **rounding(draw, len(arguments["weights"])), op="step")


def compare_rows(before, after, result):
    back = {new: old for old, new in ROWS.items()}
    compare_matrices(renamed(before, back), renamed(after, back), result)


def compare_row_norms(before, after, result):
    compare_norms(before | {"left": not before["left"]}, after, result)


CASES = {
    "row_norms": Case(norms_arguments, compare_row_norms),
    "select_rows": Case(select_arguments, compare_select),
    "gather_rows": Case(gather_arguments, exactly(sparse.gather_rows), values=INDICES),
    "scatter_add_rows_": Case(scatter_arguments, exactly(sparse.scatter_add_rows_), values=INDICES),
    "grass_step.tensor": Case(one_arguments(tensor=True), compare_one, values=INDICES),
    "grass_step": Case(one_arguments(tensor=False), compare_one, values=INDICES),
    "grass_step.list": Case(list_arguments, compare_matrices, values=INDICES),
    "step.rows": Case(rows_arguments, compare_rows, values=INDICES),
}
