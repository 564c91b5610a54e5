"""Rows whose norms come from the gradient, or from a sketch of it where the gradient never is."""

import torch

from lowrank_sys.subspace.basis import axis_of
from lowrank_sys.subspace.gaussian import gaussian_basis
from lowrank_sys.subspace.refresh import is_due
from lowrank_sys.subspace.rows import Rows

# Columns of Omega: a squared norm is estimated to sqrt(2 / COLUMNS) of itself, 12.5%.
COLUMNS = 128


class SketchedRows(Rows):
    """As Rows. `refresh`: with 'now' norms are those of the step's gradient. With 'next' they are those of its sketch, Y = G Omega
    with Omega (n, l) of N(0, 1/l), l = COLUMNS, which adds up over micro-batches: |Y_i|² is |G_i|² in the mean, and exactly where
    n <= l, for then Omega is I. They select the rows of the next step, and training starts on rows drawn from the seed.
    """

    sketched = sharded = True

    def check_sharded(self, group):
        super().check_sharded(group)
        if group["refresh"] != "now":
            raise ValueError(f"refresh must be 'now' for sharded weights, got {group['refresh']!r}")

    def init(self, state, param, group, index, count):
        shape = super().init(state, param, group, index, count)
        if group["refresh"] == "next":
            draw = torch.Generator().manual_seed(group["seed"] + index)
            rows = torch.randperm(axis_of(param.shape, state), generator=draw, device="cpu")[: group["rank"]]
            state["indices"].copy_(rows.sort().values)
            state["countdown"] -= self.first_wait(group, index, count)
        return shape

    def sketch_directions(self, param, state, warm):
        if not is_due(int(state["countdown"])):
            return None
        other, device = param.shape[1 if state["left"] else 0], state["indices"].device
        if other <= COLUMNS:
            return torch.eye(other, dtype=param.dtype, device=device)
        seed = state["seed"] + 1  # beside the numbers that rows are drawn with
        which = {"step": state["refreshes"].item(), "parameter": state["parameter"]}
        return gaussian_basis(d=other, rank=COLUMNS, seed=seed, **which, dtype=param.dtype, device=device)

    def renew(self, due):
        first, due.first = due.first, due.first and not due.sketched  # rows that training started on give way as any others
        try:
            return super().renew(due)
        finally:
            due.first = first
