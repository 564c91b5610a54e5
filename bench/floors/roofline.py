"""Promises of kernels against ceilings measured in the same rounds: the bandwidth of a copy and the rate of a GEMM."""

import functools

import torch

from lowrank_sys.bench import kernels, machine, timing
from lowrank_sys.bench.cases import OPS, make
from lowrank_sys.bench.cases.case import Case
from lowrank_sys.bench.floors.floor import HERE, RANK, SIZE, Floor, expect_correct

# Side of the matrices on which kernels are checked: in fp64, SIZE takes minutes.
CHECKED = 512
# Ops with a floor of their own.
OWN = ("newton_schulz",)
# A round takes an op, a copy and a GEMM; of each op at least so many, for so many seconds.
ROUNDS, SECONDS = 7, 1.5


@functools.cache
def _rows(timer):
    """A row an op and side, bound by its counted bytes or by its counted products; what does other work has no such bound."""
    sticks = machine.yardsticks(timer.device, [torch.float32])
    ops = {name: op for name, op in OPS.items() if not (op.other or name in OWN)}
    cases = [
        Case(name, SIZE, SIZE, RANK if op.ranked else None, torch.float32, left, "cpu")
        for name, op in ops.items()
        for left in ((True, False) if op.sided else (None,))
    ]
    return [_row(case, timer, sticks) for case in cases]


def _row(case, timer, sticks):
    """{"op", "side", "bound", "roofline"}: the share is of what a copy and a GEMM do in the same rounds."""
    trial = kernels.Trial(case, base="", backends=["cpu"])
    trial.check(case._replace(m=CHECKED, n=CHECKED))
    ((variant, function),) = trial.functions.items()
    expect_correct(case, variant, trial.verdicts[variant])
    op, tensors = trial.op, make(case)
    functions = {name: function for name, (function, _) in sticks.items()}
    times = timer.interleave({variant: lambda: op.call(function, tensors, case), **functions}, seconds=SECONDS, at_least=ROUNDS)
    work = {"copy": op.traffic(case) / 1e9, torch.float32: op.flop(case) / 1e9}
    shares = {
        name: [work[name] / sticks[name][1] * stick / own for stick, own in zip(times[name], times[variant])] for name in sticks
    }
    shares = {name: timing.quantile(values, 0.5) for name, values in shares.items()}
    limit = max(shares, key=shares.get)
    return {"op": case.op, "side": case.side, "bound": "bytes" if limit == "copy" else "products", "roofline": shares[limit]}


def worst(timer, bound, limit):
    """(least share of the ceiling that bounds them, which op and side has it, and how many reach the limit)."""
    rows = [row for row in _rows(timer) if row["bound"] == bound]
    row, reach = min(rows, key=lambda row: row["roofline"]), sum(row["roofline"] >= limit for row in rows)
    return row["roofline"], f"{' '.join(filter(None, (row['op'], row['side'])))}; {reach} of {len(rows)} reach it"


def _floor(what, bound, limit):
    return Floor(
        f"{what}, {HERE}", f">= {limit:.0%}", limit, functools.partial(worst, bound=bound, limit=limit), True, "{:.0%}", names=True
    )


FLOORS = [
    _floor("byte-shaped kernels, of the copy bandwidth", "bytes", 0.7),
    _floor("GEMM-shaped kernels, of the GEMM rate", "products", 0.85),
]
