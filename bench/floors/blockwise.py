"""Promises of 8-bit moments."""

import torch

from lowrank_sys.bench.cases.case import Case
from lowrank_sys.bench.floors.floor import SIZE, Floor, served


def adam_8bit(timer):
    """Time of bitsandbytes' AdamW8bit step over that of adam_8bit_."""
    case = Case("adam_8bit_", SIZE, SIZE, None, torch.float32, None, "cpu")
    return 1 / served(case, timer)["ratio"]


FLOORS = [Floor(f"8-bit AdamW against bitsandbytes, {SIZE}x{SIZE}, fp32", ">= 8x faster", 8.0, adam_8bit, True, "{:.1f}x")]
