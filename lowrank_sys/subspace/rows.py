"""A structured sparse subspace: rows of the identity, so that projecting gathers and projecting back scatters."""

import torch

from lowrank_sys._ops.rules import expect, expect_matrix
from lowrank_sys._ops.sparse import METHODS, expect_indices, expect_row_scale
from lowrank_sys.subspace.basis import ROWS
from lowrank_sys.subspace.keys import CARRIED
from lowrank_sys.subspace.kind import Kind
from lowrank_sys.subspace.refresh import COLD, OP, expect_carried, expect_named, expect_on_host, is_taken, new_verdict
from lowrank_sys.subspace.transport import TRANSPORTS

DRAWN = ("sample", "sample_replace")  # by their norms


class Rows(Kind):
    """Rows of G (left) or columns, selected by their norms (Muhamed et al. 2024); no basis, and no dense product.

    Group keys: `rank` (rows kept), `update_proj_gap`, `proj_type`, `seed` as Orthonormal's; `subspace`: 'top' norms, or drawn in
    proportion to them, 'sample' without and 'sample_replace' with replacement, and scaled so that the estimate is unbiased; or
    'uniform', drawn all alike (FRUGAL);
    `moments` at a refresh: 'reset' (the paper's) | 'keep'. Refreshes are staggered over matrices. A row whose norm is not finite
    comes last; a gradient without any that is finite and not zero is no choice.

    State of a matrix: `indices` (r,) int32; `row_scale` (r,) fp32 where rows are drawn by their norms; `left`; `countdown` and
    `refreshes`, on the host; `first_gap`, `seed` and `parameter`.
    """

    defaults = {**Kind.defaults, "subspace": "top", "moments": "reset"}
    categories = {**Kind.categories, **ROWS.categories, "missed": "counters", "refreshes": "counters"}
    on_host = (*Kind.on_host, "missed", "refreshes")
    sharded = True
    # A norm is not linear in the gradient: no sketch of it adds up over micro-batches.

    def selections(self):
        return (*METHODS, "uniform")

    def transports(self, group):
        return CARRIED

    def init(self, state, param, group, index, count):
        rank, gap = group["rank"], group["update_proj_gap"]
        state["left"], shape = self.low_rank_shape(group, param)
        state["indices"] = torch.arange(rank, dtype=torch.int32, device=param.device)
        if group["subspace"] in DRAWN:
            state["row_scale"] = torch.ones(rank, dtype=torch.float32, device=param.device)
        state["countdown"], state["refreshes"] = torch.tensor(COLD, device="cpu"), torch.tensor(0, device="cpu")
        state.update(new_verdict(param.device))
        state["first_gap"] = index * gap // count + 1
        state["seed"], state["parameter"] = group["seed"], index
        return shape

    def expect(self, due):
        expect_named(due, "indices", "refreshes", "seed", "parameter", "first_gap")
        grad, indices = due.raw, due.state["indices"]
        expect_matrix(OP, "gradient", grad)
        expect_indices(OP, indices, grad.device)
        expect_row_scale(OP, "row_scale", due.state.get("row_scale"), indices)
        expect_on_host("refreshes", due.state["refreshes"])
        rank, (m, n) = indices.shape[0], grad.shape
        most = m if due.left else n
        expect(rank <= most, OP, lambda: f"rank must be at most {most} for a gradient of shape ({m}, {n}), got {rank}")
        if due.sketched:  # its other axis is not the gradient's
            m, n = (m, None) if due.left else (None, n)
        expect_carried(due, (rank, n) if due.left else (m, rank), grad.device)

    def renew(self, due):
        state = due.state
        norms = due.shard.norms(torch.ops.lowrank.row_norms(due.gradient, left=due.left))
        taken = is_taken(norms, state)
        if taken or due.first:
            uniform = due.select == "uniform"
            indices, scale = torch.ops.lowrank.select_rows(
                torch.ones_like(norms) if uniform else norms, r=ROWS.rank(state), method="sample" if uniform else due.select,
                seed=due.seed, step=state["refreshes"].item(), parameter=state["parameter"],
            )  # fmt: skip
            state["indices"].copy_(indices)
            if "row_scale" in state:
                state["row_scale"].copy_(scale)
            if not due.first:
                TRANSPORTS[due.transport].carry(due, None, None, None)
        if due.training:
            state["refreshes"] += taken
        return taken
