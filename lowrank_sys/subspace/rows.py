"""A structured sparse subspace: rows of the identity, so that projecting gathers and projecting back scatters."""

import torch

from lowrank_sys._ops.schedule import MOMENTS
from lowrank_sys._ops.sparse import METHODS
from lowrank_sys.subspace.refresh import COLD
from lowrank_sys.subspace.subspace import Subspace


class Rows(Subspace):
    """Rows of G (left) or columns, selected by their norms (Muhamed et al. 2024); no basis, and no dense product.

    Group keys: `rank` (rows kept), `update_proj_gap`, `proj_type`, `seed` as Subspace's; `subspace`: 'top' norms, or drawn in
    proportion to them, 'sample' without and 'sample_replace' with replacement, and scaled so that the estimate is unbiased;
    `moments` at a refresh: 'reset' (the paper's) | 'keep'. Refreshes are staggered over matrices.

    State of a matrix: `indices` (r,) int32; `row_scale` (r,) fp32 where rows are drawn; `left`; `countdown` and `refreshes`,
    on the host; `first_gap`, `seed` and `parameter`.
    """

    defaults = {"update_proj_gap": 200, "proj_type": "std", "subspace": "top", "moments": "reset", "seed": 0, "refresh": "now"}
    categories = {"indices": "basis", "row_scale": "basis", "countdown": "counters", "refreshes": "counters"}
    on_host = ("countdown", "refreshes")
    # A norm is not linear in the gradient: no sketch of it adds up over micro-batches.
    subspaces, transports, refreshes = METHODS, MOMENTS, ("now",)

    def init(self, state, param, group, index, count):
        rank, gap = group["rank"], group["update_proj_gap"]
        state["left"], shape = self.low_rank_shape(group, param)
        state["indices"] = torch.arange(rank, dtype=torch.int32, device=param.device)
        if group["subspace"] != "top":
            state["row_scale"] = torch.ones(rank, dtype=torch.float32, device=param.device)
        state["countdown"], state["refreshes"] = torch.tensor(COLD, device="cpu"), torch.tensor(0, device="cpu")
        state["first_gap"] = index * gap // count + 1
        state["seed"], state["parameter"] = group["seed"], index
        return shape

    def refresh(self, group, grads, states, lr, left):
        def column(key):
            return [s[key] for s in states]

        moments = group["moments"]
        torch.ops.lowrank.refresh_rows_(
            column("indices"),
            [] if group["subspace"] == "top" else column("row_scale"),
            grads,
            column("countdown"),
            column("refreshes"),
            *self._transported(moments, states),
            lr,
            left=left,
            gap=group["update_proj_gap"],
            first_gaps=column("first_gap"),
            seeds=column("seed"),
            parameters=column("parameter"),
            method=group["subspace"],
            moments=moments,
        )

    def measured(self, group, grad, state):
        return torch.ops.lowrank.gather_rows(grad, state["indices"], state.get("row_scale"), left=state["left"])
