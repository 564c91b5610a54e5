"""What one promise is, and the size at which most are measured."""

from typing import Callable, NamedTuple

from lowrank_sys.bench import kernels
from lowrank_sys.cli import CommandError

SIZE, RANK = 4096, 128
HERE = f"{SIZE}x{SIZE}, r = {RANK}, fp32"
CEILINGS = {"copy_gb_per_s": 1.0, "gemm_gflop_per_s": {"float32": 1.0}}  # rooflines are not part of a floor


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
    limit: float
    measure: Callable  # timer -> the figure
    at_least: bool  # whether the figure must be at least the limit, or at most
    form: str = "{:.2f}x"
    names: bool = False  # whether `measure` returns (figure, of what) instead
    long: bool = False  # whether it is measured only with --all

    def holds(self, figure):
        return figure >= self.limit if self.at_least else figure <= self.limit
