"""What architectures allow and what cards reach: occupancy and rooflines, computed, never measured."""

from typing import NamedTuple

import torch

from lowrank_sys.kernels.configs import Target
from lowrank_sys.kernels.roofline import FIGURES


class Limits(NamedTuple):
    """Of a multiprocessor (CUDA C++ Programming Guide, compute capabilities)."""

    threads: int
    blocks: int
    shared: int  # KiB for all blocks
    block: int  # KiB for one block


LIMITS = {
    80: Limits(2048, 32, 164, 163),
    86: Limits(1536, 16, 100, 99),
    89: Limits(1536, 24, 100, 99),
    90: Limits(2048, 32, 228, 227),
    100: Limits(2048, 32, 228, 227),
    120: Limits(1536, 24, 100, 99),
}
REGISTERS = 65536  # of a multiprocessor
TENSOR_MEMORY = 512  # columns of a multiprocessor of sm_100
RESERVED = 1024  # bytes of shared memory that the system takes a block


def up(value, step):
    return -(-value // step) * step


def occupancy(arch, *, registers, shared, threads):
    """Share of a multiprocessor's threads that are resident; 0 where not one block fits.

    Registers are given out a warp at a time in units of 256, four warps together; shared memory in units of 128 bytes.
    """
    limits = LIMITS[arch]
    warps = up(threads, 32) // 32
    resident = [
        limits.blocks,
        limits.threads // threads,
        REGISTERS // up(32 * registers, 256) // 4 * 4 // warps,
        limits.shared * 1024 // (up(shared, 128) + RESERVED),
    ]
    if shared > limits.block * 1024:
        return 0.0
    return min(resident) * threads / limits.threads


class Card(NamedTuple):
    """Published figures: GB/s, and dense TFLOP/s of the tensor cores with fp32 sums."""

    target: Target
    bandwidth: float
    narrow: float  # bf16 and fp16
    tf32: float

    def peak(self, dtype):
        """FLOP/s; an fp32 product is three tf32 products."""
        return 1e12 * (self.tf32 / 3 if dtype == torch.float32 else self.narrow)


def _card(arch):
    figures = FIGURES[arch]
    return Card(Target(arch, figures.multiprocessors), figures.bandwidth, figures.narrow, figures.tf32)


CARDS = {"RTX 3090": _card(86), "RTX 4090": _card(89), "A100 80GB": _card(80), "H100 SXM": _card(90)}


def roofline(card, dtype, moved, flop):
    """(seconds that no kernel can beat, what bounds them)."""
    memory, compute = moved / (1e9 * card.bandwidth), flop / card.peak(dtype)
    return max(memory, compute), "memory" if memory >= compute else "products"
