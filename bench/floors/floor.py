"""What one promise is, and the size at which most are measured."""

from typing import Callable, NamedTuple

from lowrank_sys.bench import kernels
from lowrank_sys.cli import CommandError

SIZE, RANK = 4096, 128
HERE = f"{SIZE}x{SIZE}, r = {RANK}, fp32"
CEILINGS = {"copy_gb_per_s": 1.0, "gemm_gflop_per_s": {"float32": 1.0}}  # rooflines are not part of a floor


def served(case, timer, ceilings=CEILINGS, *, seconds=5, **options):
    """The row of who serves an op; a kernel that is wrong is no figure."""
    row = kernels.measure(case, timer, ceilings, seconds=seconds, **options)[0]
    if row["check"] != "ok":
        raise CommandError(f"{case.op}, served by {row['variant']}: {row['check']}", code=1)
    return row


class Floor(NamedTuple):
    what: str
    promise: str
    limit: float
    measure: Callable  # timer -> the figure
    at_least: bool  # whether the figure must be at least the limit, or at most
    form: str = "{:.2f}x"
    names: bool = False  # whether `measure` returns (figure, of what) instead
    long: bool = False  # whether it is measured only with --all

    def holds(self, figure):
        return figure >= self.limit if self.at_least else figure <= self.limit
