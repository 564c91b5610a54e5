"""What one promise is, and the size at which most are measured."""

from typing import Callable, NamedTuple

SIZE, RANK = 4096, 128
HERE = f"{SIZE}x{SIZE}, r = {RANK}, fp32"
CEILINGS = {"copy_gb_per_s": 1.0, "gemm_gflop_per_s": {"float32": 1.0}}  # rooflines are not part of a floor


class Floor(NamedTuple):
    what: str
    promise: str
    limit: float
    measure: Callable  # timer -> the figure
    at_least: bool  # whether the figure must be at least the limit, or at most
    form: str = "{:.2f}x"

    def holds(self, figure):
        return figure >= self.limit if self.at_least else figure <= self.limit
