"""Promises of bases in INT4."""

import torch

from lowrank_sys.bench.cases import make
from lowrank_sys.bench.cases.case import Case
from lowrank_sys.bench.cases.int4 import NAMES
from lowrank_sys.bench.floors.floor import HERE, RANK, SIZE, Floor, served


def product(timer, op):
    """Time of a product with an INT4 basis over that of the fp32 GEMM, on the worse side."""
    return max(served(Case(op, SIZE, SIZE, RANK, torch.float32, left, "cpu"), timer)["ratio"] for left in (True, False))


def basis_bytes(timer):
    """Bytes of a basis beside its scales and offsets, an entry."""
    t = make(Case("project_int4", SIZE, SIZE, RANK, torch.float32, True, "cpu"))
    scales = 8 * RANK * SIZE // 256
    return (sum(t[name].nbytes for name in NAMES) - scales) / (SIZE * RANK)


FLOORS = [
    Floor(f"project_int4 over the fp32 GEMM, {HERE}", "<= 1.25x", 1.25, lambda timer: product(timer, "project_int4"), False),
    Floor(
        f"back_project_int4_ over the fp32 GEMM, {HERE}",
        "<= 1.25x",
        1.25,
        lambda timer: product(timer, "back_project_int4_"),
        False,
    ),
    Floor("bytes of an INT4 basis beside its scales, an entry", "<= 0.5", 0.5, basis_bytes, False, "{:.2f}", speed=False),
]
