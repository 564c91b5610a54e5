"""What one promise is, on which processors, and the size at which most are measured."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from lowrank_sys.bench import kernels
from lowrank_sys.cli import CommandError

SIZE, RANK = 4096, 128
HERE = f"{SIZE}x{SIZE}, r = {RANK}, fp32"
CEILINGS = {"copy_gb_per_s": 1.0, "gemm_gflop_per_s": {"float32": 1.0}}  # rooflines are not part of a floor


WIDE = "AVX-512 with VNNI"
# What a promise of speed is on other processors, of what it is on a WIDE one, where it has no limit of its own.
TENTH = 0.1


def processor_class():
    """WIDE, or the widest instructions that torch uses here, such as AVX2."""
    capability = torch.backends.cpu.get_cpu_capability()
    try:
        vnni = "avx512_vnni" in Path("/proc/cpuinfo").read_text().split()
    except OSError:
        vnni = False
    return WIDE if vnni and capability == "AVX512" else {"AVX512": "AVX-512 without VNNI"}.get(capability, capability)


def served(case, timer, *, seconds=5, **options):
    """The row of who serves an op; a kernel that is wrong is no figure."""
    row = kernels.measure(case, timer, CEILINGS, seconds=seconds, **options)[0]
    expect_correct(case, row["variant"], row["check"])
    return row


def expect_correct(case, variant, verdict):
    if verdict != "ok":
        raise CommandError(f"{case.op}, served by {variant}: {verdict}", code=1)


class Floor(NamedTuple):
    what: str
    promise: str
    limit: float  # on a processor of the class WIDE
    measure: Callable  # timer -> the figure
    at_least: bool  # whether the figure must be at least the limit, or at most
    form: str = "{:.2f}x"
    names: bool = False  # whether `measure` returns (figure, of what) instead
    long: bool = False  # whether it is measured only with --all
    narrow: float | None = None  # the limit on other processors
    speed: bool = True  # whether the processor matters at all

    def on(self, processor):
        """This promise as it is held on a class of processors."""
        if processor == WIDE or not self.speed:
            return self
        limit = self.narrow or self.limit * (1 - TENTH if self.at_least else 1 + TENTH)
        shown = f"{(100 if '%' in self.promise else 1) * limit:.4g}"
        return self._replace(limit=limit, promise=re.sub(r"[\d.]+", shown, self.promise, count=1))

    def holds(self, figure):
        return figure >= self.limit if self.at_least else figure <= self.limit
