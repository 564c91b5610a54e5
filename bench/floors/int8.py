"""Promises of INT8 weights."""

import torch

from lowrank_sys.bench import timing
from lowrank_sys.bench.cases import OPS, make, serving
from lowrank_sys.bench.cases.case import Case
from lowrank_sys.bench.floors.floor import SIZE, Floor


def over_base(op, m, n):
    """A measurement: time of an op over that of its base."""

    def measure(timer):
        case = Case(op, m, n, None, torch.float32, None, "cpu")
        tensors, function = make(case), serving(case)[1]
        base = next(iter(OPS[op].bases.values()))(make(case), case)
        times = timer.interleave({"ours": lambda: OPS[op].call(function, tensors, case), "base": base}, seconds=5, at_least=5)
        return timing.quantile(times["ours"], 0.5) / timing.quantile(times["base"], 0.5)

    return measure


FLOORS = [
    Floor(
        "int8_update_ over a copy of the same traffic, 4096x11008, fp32",
        "<= 3x",
        3.0,
        over_base("int8_update_", 4096, 11008),
        False,
        narrow=4.0,
    ),
    Floor(f"int8_linear over the fp32 GEMM, 512 x {SIZE}x{SIZE}", "<= 1.25x", 1.25, over_base("int8_linear", SIZE, SIZE), False),
]
