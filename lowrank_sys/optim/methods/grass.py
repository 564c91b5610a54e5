"""Grass (Muhamed et al., EMNLP 2024, arXiv:2406.17660): Adam on selected rows of the gradient."""

from lowrank_sys.optim.optimizer import LowRankOptimizer
from lowrank_sys.optim.pipeline import Pipeline
from lowrank_sys.optim.preset import method
from lowrank_sys.optim.rules import Adam
from lowrank_sys.optim.types import Betas, NonFinite, Params, PerLayer, Rate
from lowrank_sys.subspace.sketched_rows import SketchedRows


@method("grass", lr=5e-3, plain_lr=3e-3, subspace="top")
class GrassAdamW(LowRankOptimizer):
    """W <- (1 - lr*wd) W - lr*scale*scatter(Adam(gather(G))): the basis is `rank` rows of the identity, times a scale each.

    No product is dense: a step reads and writes the selected rows, and the others only for weight decay. A refresh reads the
    gradient once. Groups without `rank` are plain AdamW. Group keys: `rank`, `update_proj_gap` (200), `scale` (0.25),
    `proj_type`, `subspace` (top | sample | sample_replace), `moments` at a refresh (reset | keep), `seed`, `refresh` (now | next:
    by the norms of a sketch, SketchedRows).

    Args:
        params, lr, betas, eps, weight_decay, nonfinite: as GaLoreAdamW; all of a matrix decays.
        per_layer: None | 'accumulate' | 'in_backward'.

    State of a matrix (m, n): `exp_avg`, `exp_avg_sq` fp32 (r, n) or (m, r), `indices` int32 (r,), `row_scale` fp32 (r,) where
    rows are drawn, `step`, and the schedule.
    """

    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        nonfinite: NonFinite = "skip",
        per_layer: PerLayer = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, Pipeline(Adam(), subspace=SketchedRows()), defaults, nonfinite, per_layer)
