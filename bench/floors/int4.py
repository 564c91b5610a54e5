"""Promises of bases in INT4."""

import torch

from lowrank_sys.bench import kernels
from lowrank_sys.bench.cases import make
from lowrank_sys.bench.cases.case import Case
from lowrank_sys.bench.cases.int4 import NAMES
from lowrank_sys.bench.floors.floor import CEILINGS, HERE, RANK, SIZE, Floor
from lowrank_sys.cli import CommandError


def product(timer, op):
    """Time of a product with an INT4 basis over that of the fp32 GEMM, on the worse side."""
    ratios = []
    for left in (True, False):
        served = kernels.measure(Case(op, SIZE, SIZE, RANK, torch.float32, left, "cpu"), timer, CEILINGS, seconds=5)[0]
        if served["check"] != "ok":
            raise CommandError(f"{op}, served by {served['variant']}: {served['check']}", code=1)
        ratios.append(served["ratio"])
    return max(ratios)


def basis_bytes(timer):
    """Bytes of a basis beside its scales and offsets, an entry."""
    t = make(Case("project_int4", SIZE, SIZE, RANK, torch.float32, True, "cpu"))
    scales = 8 * RANK * SIZE // 256
    return (sum(t[name].nbytes for name in NAMES) - scales) / (SIZE * RANK)


FLOORS = [
    Floor(f"project_int4 over the fp32 GEMM, {HERE}", "<= 1.25x", 1.25, lambda timer: product(timer, "project_int4"), False),
    Floor(f"back_project_int4_ over the fp32 GEMM, {HERE}", "<= 1.25x", 1.25,
          lambda timer: product(timer, "back_project_int4_"), False),
    Floor("bytes of an INT4 basis beside its scales, an entry", "<= 0.5", 0.5, basis_bytes, False, "{:.2f}"),
]
