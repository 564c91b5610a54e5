"""A subspace of columns of one orthogonal transform that all matrices share: a basis is their indices."""

import torch

from lowrank_sys._ops.rules import expect, expect_dtype, expect_like, expect_matrix
from lowrank_sys.subspace.basis import COLUMNS
from lowrank_sys.subspace.dct import select_columns
from lowrank_sys.subspace.kind import Kind
from lowrank_sys.subspace.refresh import COLD, OP, expect_carried, expect_named, is_taken, new_verdict
from lowrank_sys.subspace.transport import TRANSPORTS

NORMS = {"l1": 1, "l2": 2}


class Columns(Kind):
    """Columns of the orthonormal DCT-II on which the gradient is largest (Modoranu et al. 2025, lowrank_sys.subspace.dct).

    Group keys: `rank`, `update_proj_gap` (1), `proj_type`; `subspace`: by which norm columns are compared, 'l1' (the paper's) or
    'l2' (the best choice of r); `moments` at a refresh: 'match' (those of a column that stays are carried over, exactly) | 'keep'
    | 'reset'. Refreshes are spread over matrices. A channel that is not finite does not count; a gradient without any that is
    finite and not zero is no choice.

    State of a matrix: `columns` int32 (r,), ascending; `left`; `countdown`, on the host; `first_gap`.
    """

    defaults = {**Kind.defaults, "subspace": "l1", "moments": "match", "update_proj_gap": 1}
    categories = {**Kind.categories, **COLUMNS.categories, "missed": "counters"}
    on_host, sharded = (*Kind.on_host, "missed"), True

    def selections(self):
        return tuple(NORMS)

    def transports(self, group):
        return ("match", "keep", "reset")

    def init(self, state, param, group, index, count):
        rank, gap = group["rank"], group["update_proj_gap"]
        state["left"], shape = self.low_rank_shape(group, param)
        state["columns"] = torch.arange(rank, dtype=torch.int32, device=param.device)
        state["countdown"] = torch.tensor(COLD, device="cpu")
        state.update(new_verdict(param.device))
        state["first_gap"] = index * gap // count + 1
        return shape

    def expect(self, due):
        expect_named(due, "columns", "first_gap")
        grad, columns = due.raw, due.state["columns"]
        expect_matrix(OP, "gradient", grad)
        expect(columns.dim() == 1, OP, lambda: f"columns must be a vector (r,), got shape {tuple(columns.shape)}")
        expect_like(OP, "columns", columns, columns.shape, grad.device)
        expect_dtype(OP, "columns", columns, torch.int32)
        rank, (m, n) = len(columns), grad.shape
        most = m if due.left else n
        expect(rank <= most, OP, lambda: f"rank must be at most {most} for a gradient of shape ({m}, {n}), got {rank}")
        expect_carried(due, (rank, n) if due.left else (m, rank), grad.device)

    def renew(self, due):
        columns, shard = due.state["columns"], due.shard
        options = {"rank": len(columns), "left": due.left, "norm": NORMS[due.select]}
        if shard.group:
            new, norms = select_columns(due.gradient, shard=shard, **options)
        else:
            new, norms = torch.ops.lowrank.dct_select(due.gradient, **options)
        new = shard.share(new)
        new = torch.where((norms > 0).any(), new, columns)  # a GPU is not asked whether there was anything to choose from
        if taken := is_taken(norms, due.state):
            old, kept = columns.clone(), (columns == new).all()
            columns.copy_(new)
            if not due.first:
                TRANSPORTS[due.transport].carry(due, old, new, kept)
        return taken
