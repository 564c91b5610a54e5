"""Promises of orthogonalizing an update."""

import torch

from lowrank_sys.bench.cases.case import Case
from lowrank_sys.bench.floors.floor import Floor, served

# A low-rank momentum and a dense one, wide and tall.
SHAPES = ((1024, 4096), (4096, 1024), (2048, 2048))


def newton_schulz(timer):
    """Time of newton_schulz over that of its bare GEMMs, at the worst of the sizes."""
    return max(served(Case("newton_schulz", m, n, None, torch.float32, None, "cpu"), timer)["ratio"] for m, n in SHAPES)


FLOORS = [Floor("newton_schulz over its GEMMs, 1024x4096, 4096x1024 and 2048x2048, fp32", "<= 1.1x", 1.1, newton_schulz, False)]
