"""Structured sparse ops. Bytes are those of the selected rows, of a column its cache lines; weight decay adds a read and a
write of the rest of W."""

import torch

from lowrank_sys import reference
from lowrank_sys.bench.cases.case import ADAM, Op, adam_bytes, low_rank, moments, refresh, scalars
from lowrank_sys.reference.selection import select_rows
from lowrank_sys.reference.sparse import row_norms


def _indices(case):
    """Every k-th row or column."""
    d = case.m if case.left else case.n
    return (torch.arange(case.rank, device=case.device) * (d // case.rank)).int()


LINE = 64


def _selected(case):
    """Bytes that the selected rows or columns lie in."""
    apart = case.element if case.left else min(LINE, case.n * case.element // case.rank)
    return apart * case.low_rank


def _grass_inputs(case, randn):
    return {
        "param": randn(case.m, case.n),
        "grad": randn(case.m, case.n),
        "indices": _indices(case),
        "row_scale": torch.ones(case.rank, device=case.device),
        **moments(low_rank(case), randn),
        **scalars(case),
    }


def _grass_step(f, t, case):
    f(
        t["param"],
        t["grad"],
        t["indices"],
        t["row_scale"],
        t["exp_avg"],
        t["exp_avg_sq"],
        step=t["step"],
        lr=t["lr"],
        scale=0.25,
        left=case.left,
        **ADAM,
    )
    return [t["param"], t["exp_avg"], t["exp_avg_sq"]]


def _gather_inputs(case, randn):
    return {"grad": randn(case.m, case.n), "indices": _indices(case)}


def _scatter_inputs(case, randn):
    return {"param": randn(case.m, case.n), "low_rank": randn(*low_rank(case), dtype=torch.float32), "indices": _indices(case)}


def _scatter(f, t, case):
    f(t["param"], t["low_rank"], t["indices"], None, alpha=1e-3, left=case.left)
    return [t["param"]]


def _select_inputs(case, randn):
    return {"norms": randn(case.m if case.left else case.n, dtype=torch.float32).abs()}


def _index_select(t, case):
    return lambda: t["grad"].index_select(0 if case.left else 1, t["indices"])


def _index_add(t, case):
    rows = t["low_rank"].to(case.dtype)
    return lambda: t["param"].index_add_(0 if case.left else 1, t["indices"], rows)


def _decay(t, case):
    return lambda: t["param"].mul_(0.999)


def _rows(case):
    return case.m if case.left else case.n


def _norms(t, case):
    return lambda: torch.linalg.vector_norm(t["grad"], dim=1 if case.left else 0, dtype=torch.float32)


def _refresh_inputs(case, randn):
    # Rows whose norms differ by more than rounding: every backend selects the same.
    grad, d = randn(case.m, case.n, dtype=torch.float32), 1 if case.left else 0
    norms = 1 + torch.arange(_rows(case), device=case.device) / _rows(case)
    grad *= norms.unsqueeze(d) / torch.linalg.vector_norm(grad, dim=d, keepdim=True)
    return {
        "grad": grad.to(case.dtype),
        "indices": _indices(case),
        "countdown": torch.tensor(0),
        "refreshes": torch.tensor(1),
        **scalars(case),
    }


def _refresh_rows(f, t, case):
    t["countdown"].zero_()
    state = {key: t[key] for key in ("indices", "countdown", "refreshes")}
    numbers = {"seed": 1, "parameter": 0}
    refresh(f, state, t["grad"], t["lr"], numbers, kind="Rows", select="top", transport="keep", left=case.left)
    return [t["indices"]]


def _chosen_rows(tensors, gradients, *_, left, select, **__):
    tensors[0].copy_(select_rows(row_norms(gradients[0], left=left), r=tensors[0].shape[0], method=select)[0])


OPS = {
    "grass_step": Op(
        _grass_inputs,
        _grass_step,
        traffic=lambda c: 2 * c.element * c.matrix + _selected(c) + adam_bytes(c.low_rank),
        flop=lambda c: c.matrix + 12 * c.low_rank,
        bases={"decay": _decay},
        overload="grass_step.tensor",
        oracle=reference.named("grass_step"),
    ),
    "row_norms": Op(
        lambda case, randn: {"grad": randn(case.m, case.n)},
        lambda f, t, c: [f(t["grad"], left=c.left)],
        traffic=lambda c: c.element * c.matrix + 4 * _rows(c),
        flop=lambda c: 2 * c.matrix,
        bases={"torch": _norms},
        overload="row_norms",
        oracle=row_norms,
        ranked=False,
        truth=lambda grad, *, left: torch.linalg.vector_norm(grad, dim=1 if left else 0),
    ),
    "select_rows": Op(
        _select_inputs,
        lambda f, t, c: [f(t["norms"], r=c.rank, method="sample", seed=1)[0]],
        traffic=lambda c: 4 * _rows(c) + 8 * c.rank,
        flop=lambda c: 64 * _rows(c),
        bases={"multinomial": lambda t, c: lambda: torch.multinomial(t["norms"], c.rank)},
        overload="select_rows",
        oracle=select_rows,
        exact=True,
        other="selection",
    ),
    "refresh_ rows": Op(
        _refresh_inputs,
        _refresh_rows,
        traffic=lambda c: c.element * c.matrix + 4 * (_rows(c) + c.rank),
        flop=lambda c: 2 * c.matrix,
        bases={"norms": _norms},
        overload="refresh_",
        oracle=_chosen_rows,
        exact=True,
    ),
    "gather_rows": Op(
        _gather_inputs,
        lambda f, t, c: [f(t["grad"], t["indices"], None, left=c.left)],
        traffic=lambda c: _selected(c) + 4 * c.low_rank,
        flop=lambda c: c.low_rank,
        bases={"index_select": _index_select},
        overload="gather_rows",
        oracle=reference.gather_rows,
    ),
    "scatter_add_rows_": Op(
        _scatter_inputs,
        _scatter,
        traffic=lambda c: 2 * _selected(c) + 4 * c.low_rank,
        flop=lambda c: 2 * c.low_rank,
        bases={"index_add": _index_add},
        overload="scatter_add_rows_",
        oracle=reference.scatter_add_rows_,
    ),
}
