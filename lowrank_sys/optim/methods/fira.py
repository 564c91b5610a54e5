"""Fira (Chen et al. 2024, arXiv:2410.01623): GaLore, and the rest of the gradient scaled as Adam scales the low-rank part."""

from lowrank_sys.optim.optimizer import LowRankOptimizer
from lowrank_sys.optim.pipeline import Pipeline
from lowrank_sys.optim.preset import method
from lowrank_sys.optim.remainder import ScaledResidual
from lowrank_sys.optim.rules import RatioAdam
from lowrank_sys.optim.types import Betas, NonFinite, Params, PerLayer, Rate


@method("fira", lr=2e-3, plain_lr=3e-3, scale_key="alpha")
class FiraAdamW(LowRankOptimizer):
    """W <- (1 - lr*wd) W - a [alpha back(N) + s o (G - alpha back(R))]; a, s and N as APOLLOAdamW.

    The norm of the second term grows by at most 1% a step. Groups without `rank` are plain AdamW. Group keys as Fira's:
    `rank`, `update_proj_gap` (200), `alpha` (0.25), `proj_type`, and the other keys of GaLoreAdamW but `scale`. Its code, and
    so this, scales the back(R) that is taken away by alpha too, which the paper does not; it decays after the update.

    Args:
        params, lr, betas, weight_decay, nonfinite: as GaLoreAdamW.
        eps: added to sqrt(V), without bias correction in matrices.
        per_layer: None | 'in_backward': the step needs the whole gradient.

    State of a matrix: that of GaLoreAdamW, and `limiter`.
    """

    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        nonfinite: NonFinite = "skip",
        per_layer: PerLayer = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, Pipeline(RatioAdam(), remainder=ScaledResidual()), defaults, nonfinite, per_layer)
