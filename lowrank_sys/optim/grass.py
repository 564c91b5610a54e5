"""Grass (Muhamed et al., EMNLP 2024, arXiv:2406.17660): Adam on selected rows of the gradient."""

import torch

from lowrank_sys.optim.adam import adam_defaults
from lowrank_sys.optim.inner import Adam
from lowrank_sys.optim.optimizer import LowRankOptimizer
from lowrank_sys.optim.residual import Dropped
from lowrank_sys.subspace.rows import Rows


class AdamOnRows(Adam):
    """Adam whose low-rank step gathers and scatters."""

    def low_rank_step(self, group, params, grads, states, lr, left, guards):
        def column(key):
            return [state[key] for state in states]

        torch.ops.lowrank.grass_step.list(
            params,
            grads,
            column("indices"),
            [] if group["subspace"] == "top" else column("row_scale"),
            column("exp_avg"),
            column("exp_avg_sq"),
            column("step"),
            lr=lr,
            scale=group["scale"],
            left=left,
            **self.hyper(group),
            **guards,
        )


class RowsOnly(Dropped):
    """The rows that are not selected stay as they are, and which to select needs the whole gradient."""

    def starts_from_low_rank(self, inner):
        return False


class GrassAdamW(LowRankOptimizer):
    """W <- (1 - lr*wd) W - lr*scale*scatter(Adam(gather(G))): the basis is `rank` rows of the identity, times a scale each.

    No product is dense: a step reads and writes the selected rows, and the others only for weight decay. A refresh reads the
    gradient once. Groups without `rank` are plain AdamW. Group keys: `rank`, `update_proj_gap` (200), `scale` (0.25),
    `proj_type`, `subspace` (top | sample | sample_replace), `moments` at a refresh (reset | keep), `seed`.

    Args:
        params, lr, betas, eps, weight_decay, nonfinite: as GaLoreAdamW; all of a matrix decays.
        per_layer: None | 'in_backward'.

    State of a matrix (m, n): `exp_avg`, `exp_avg_sq` fp32 (r, n) or (m, r), `indices` int32 (r,), `row_scale` fp32 (r,) where
    rows are drawn, `step`, and the schedule.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, *, nonfinite="skip", per_layer=None):
        super().__init__(
            params,
            AdamOnRows(),
            adam_defaults(lr, betas, eps, weight_decay),
            nonfinite,
            per_layer,
            subspace=Rows(),
            residual=RowsOnly(),
        )
