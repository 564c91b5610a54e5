"""Promises of kernels against the ceilings that are measured first: the bandwidth of a copy and the rate of a GEMM."""

import functools

import torch

from lowrank_sys.bench import machine
from lowrank_sys.bench.cases import OPS
from lowrank_sys.bench.cases.case import Case
from lowrank_sys.bench.floors.floor import HERE, RANK, SIZE, Floor, served


# Side of the matrices on which kernels are checked: in fp64, SIZE takes minutes.
CHECKED = 512
# Ops with a floor of their own.
OWN = ("newton_schulz",)


@functools.cache
def _rows(timer):
    """A row an op and side, bound by its counted bytes or by its counted products; what does other work has no such bound."""
    ceilings = machine.ceilings(timer, [torch.float32])
    ops = {name: op for name, op in OPS.items() if not (op.other or name in OWN)}
    cases = [Case(name, SIZE, SIZE, RANK if op.ranked else None, torch.float32, left, "cpu")
             for name, op in ops.items() for left in ((True, False) if op.sided else (None,))]
    return [served(case, timer, ceilings, seconds=1, base="", backends=["cpu"], checked=case._replace(m=CHECKED, n=CHECKED))
            for case in cases]


def worst(timer, bound, limit):
    """(least share of the ceiling that bounds them, which op and side has it, and how many reach the limit)."""
    rows = [row for row in _rows(timer) if row["bound"] == bound]
    row, reach = min(rows, key=lambda row: row["roofline"]), sum(row["roofline"] >= limit for row in rows)
    return row["roofline"], f"{' '.join(filter(None, (row['op'], row['side'])))}; {reach} of {len(rows)} reach it"


def _floor(what, bound, limit):
    return Floor(f"{what}, {HERE}", f">= {limit:.0%}", limit, functools.partial(worst, bound=bound, limit=limit), True, "{:.0%}",
                 names=True)


FLOORS = [_floor("byte-shaped kernels, of the copy bandwidth", "bytes", 0.7),
          _floor("GEMM-shaped kernels, of the GEMM rate", "products", 0.85)]
