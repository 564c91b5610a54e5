"""Fira (Chen et al. 2024, arXiv:2410.01623) around Lion (Chen et al. 2023, arXiv:2302.06675)."""

from lowrank_sys.optim.preset import Preset, method
from lowrank_sys.optim.remainder import ScaledResidual
from lowrank_sys.optim.rules import Lion


@method("fira-lion", lr=1e-3, plain_lr=3e-3, scale_key="alpha")
class FiraLion(Preset):
    """W <- (1 - lr*wd) W - lr [alpha back(X) + s o (G - alpha back(R))], X = Lion(R), s_j = |X_j| / |R_j|, its norm limited.

    Group keys: those of FiraAdamW. betas (0.9, 0.99). State of a matrix: one moment of R's shape, `basis`, `limiter`, the schedule.
    """

    rule, remainder = Lion(), ScaledResidual()
