"""GaLore (Zhao et al., ICML 2024, arXiv:2403.03507) around Lion (Chen et al. 2023, arXiv:2302.06675)."""

from lowrank_sys.optim.preset import Preset, method
from lowrank_sys.optim.rules import Lion


@method("galore-lion", lr=3e-3, plain_lr=3e-3)
class GaLoreLion(Preset):
    """W <- (1 - lr*wd) W - lr*scale*back(Lion(R)): one moment of R's shape in place of two.

    Groups without `rank` are plain Lion. Group keys: those of GaLoreAdamW. betas (0.9, 0.99). State of a matrix: `exp_avg` of R's
    shape, `basis`, the schedule.
    """

    rule = Lion()
