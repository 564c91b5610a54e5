"""The subspace part of an optimizer: which side is projected, the basis a matrix keeps, and its refresh schedule."""

import torch

from lowrank_sys._ops.subspace import MOMENTS, SUBSPACES
from lowrank_sys.subspace.refresh import COLD

# proj_type -> whether the basis lies on the left of a matrix (m, n). 'std' follows the GaLore reference; 'short-moments'
# puts the basis on the long side and the moments on the short one.
SIDES = {
    "std": lambda m, n: m < n,
    "reverse_std": lambda m, n: m >= n,
    "left": lambda m, n: True,
    "right": lambda m, n: False,
    "short-moments": lambda m, n: m >= n,
}


class Subspace:
    """Select, store, refresh and transport; all settings are group keys, all state is tensors and plain numbers.

    Group keys: `rank`, `update_proj_gap` (steps between refreshes), `proj_type` (SIDES), `subspace` ('randomized' subspace
    iteration, staggered over matrices; or exact 'svd' at steps 0, gap, 2 gap, ... as the GaLore reference), `moments` at a
    refresh ('keep' | 'reset' | 'rotate'), `seed`.

    State of a matrix: `basis` (m or n, r) in the parameter's dtype; `left`; `countdown`, steps until the next refresh, on
    the host; `first_gap` and `seed`.
    """

    defaults = {"update_proj_gap": 200, "proj_type": "std", "subspace": "randomized", "moments": "keep", "seed": 0}
    categories = {"basis": "basis", "countdown": "counters"}

    def check(self, group, names):
        """Raise a ValueError that names the key, or the weight that does not fit."""
        for key, valid in (("proj_type", SIDES), ("subspace", SUBSPACES), ("moments", MOMENTS)):
            if group[key] not in valid:
                raise ValueError(f"{key} must be one of {', '.join(valid)}, got {group[key]!r}")
        for key in ("rank", "update_proj_gap"):
            if not isinstance(group[key], int) or group[key] < 1:
                raise ValueError(f"{key} must be an integer of at least 1, got {group[key]!r}")
        for name, param in zip(names, group["params"]):
            if param.dim() != 2:
                raise ValueError(f"{name} must be a matrix to be in a group with a rank, got shape {tuple(param.shape)}")
            if group["rank"] > min(param.shape):
                raise ValueError(f"rank must be at most {min(param.shape)} for {name} of shape {tuple(param.shape)}, "
                                 f"got {group['rank']}")

    def init(self, state, param, group, index, count):
        """Add this part's state for matrix `index` of `count`; returns the shape of R."""
        m, n = param.shape
        rank, gap = group["rank"], group["update_proj_gap"]
        left = SIDES[group["proj_type"]](m, n)
        state["left"] = left
        state["basis"] = param.new_zeros((m if left else n, rank))
        state["countdown"] = torch.tensor(COLD)
        state["first_gap"] = gap if group["subspace"] == "svd" else index * gap // count + 1
        state["seed"] = group["seed"] + index
        return (rank, n) if left else (m, rank)

    def refresh(self, group, grads, states, lr, left):
        """Advance the schedule of these matrices by one step; bases that are due are chosen anew."""
        moments = group["moments"]
        adam = [[s[key] for s in states] for key in ("exp_avg", "exp_avg_sq", "step")] if moments != "keep" else ([], [], [])
        torch.ops.lowrank.refresh_(
            [s["basis"] for s in states], grads, [s["countdown"] for s in states], *adam, lr,
            left=left, gap=group["update_proj_gap"], first_gaps=[s["first_gap"] for s in states],
            seeds=[s["seed"] for s in states], subspace=group["subspace"], moments=moments,
        )
