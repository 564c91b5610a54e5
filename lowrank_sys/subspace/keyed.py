"""A subspace whose basis is, by choice, a Gaussian one that is made from its key where it is used."""

import torch

from lowrank_sys._ops.schedule import MOMENTS
from lowrank_sys.subspace.subspace import Subspace

PROJECTIONS = ("random", "svd")


class Keyed(Subspace):
    """Group key `proj` (APOLLO's): 'random', a Gaussian basis that is never in memory; 'svd', Subspace's.

    A Gaussian basis owes the gradient nothing: a refresh only counts in its key, and all matrices do so in the same step.

    State of a matrix with proj='random': `key`, int64 (4,) on its device: seed, refresh, parameter, first row; `left`;
    `countdown`, on the host.
    """

    defaults = {**Subspace.defaults, "proj": "random"}
    categories = {**Subspace.categories, "key": "basis"}

    def check(self, group, names):
        if group["proj"] not in PROJECTIONS:
            raise ValueError(f"proj must be one of {', '.join(PROJECTIONS)}, got {group['proj']!r}")
        super().check(group, names)
        if group["proj"] == "random" and group["moments"] not in MOMENTS:
            raise ValueError(f"moments must be one of {', '.join(MOMENTS)} with proj='random', got {group['moments']!r}")

    def init(self, state, param, group, index, count):
        if group["proj"] != "random":
            return super().init(state, param, group, index, count)
        state["left"], shape = self.low_rank_shape(group, param)
        state["key"] = torch.tensor([group["seed"], 0, index, 0], device=param.device)
        # with 'next' the schedule advances after the step
        state["countdown"] = torch.tensor(group["update_proj_gap"] - (group["refresh"] == "next"), device="cpu")
        return shape

    def _refresh_keys(self, group, states, lr):
        torch.ops.lowrank.refresh_keys_(
            [s["key"] for s in states],
            [s["countdown"] for s in states],
            *self._transported(group["moments"], states),
            lr,
            gap=group["update_proj_gap"],
            moments=group["moments"],
        )

    def refresh(self, group, grads, states, lr, left):
        if group["proj"] == "random":
            self._refresh_keys(group, states, lr)
        else:
            super().refresh(group, grads, states, lr, left)

    def sketch_directions(self, param, state):
        return None if "key" in state else super().sketch_directions(param, state)

    def refresh_from_sketches(self, group, sketches, states, lr, left):
        if group["proj"] == "random":
            self._refresh_keys(group, states, lr)
        else:
            super().refresh_from_sketches(group, sketches, states, lr, left)

    def measured(self, group, grad, state):
        """With a Gaussian basis |R| is |G| on average, and G is there."""
        return grad if "key" in state else super().measured(group, grad, state)
