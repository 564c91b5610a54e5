"""The subspace part of an optimizer: which side is projected, the basis a matrix keeps, and its refresh schedule."""

import torch

from lowrank_sys._ops.subspace import MOMENTS, SUBSPACES
from lowrank_sys.reference.subspace import seeded_basis
from lowrank_sys.subspace.refresh import COLD, is_due

REFRESHES = ("now", "next")
# Steps over which refresh='next' spreads the first sketches of a model: each is as large as a gradient's projection.
FIRST_SKETCHES = 4

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
    refresh ('keep' | 'reset' | 'rotate'), `seed`; `refresh`: with 'now' a basis that is due is chosen from the step's gradient
    before the step uses it, with 'next' a sketch of the step's gradient, linear in it, gives the basis of the next step, and
    training starts on seeded orthonormal bases. 'next' lets micro-batches add up exactly.

    State of a matrix: `basis` (m or n, r) in the parameter's dtype; `left`; `countdown`, steps until the next refresh, on
    the host; `first_gap` and `seed`.
    """

    defaults = {"update_proj_gap": 200, "proj_type": "std", "subspace": "randomized", "moments": "keep", "seed": 0,
                "refresh": "now"}
    categories = {"basis": "basis", "countdown": "counters"}
    on_host = ("countdown",)  # state that stays there, for Python to read
    subspaces, transports, refreshes = SUBSPACES, MOMENTS, REFRESHES  # values of the keys

    def check(self, group, names):
        """Raise a ValueError that names the key, or the weight that does not fit."""
        for key, valid in (("proj_type", SIDES), ("subspace", self.subspaces), ("moments", self.transports),
                           ("refresh", self.refreshes)):
            if group[key] not in valid:
                raise ValueError(f"{key} must be one of {', '.join(valid)}, got {group[key]!r}")
        if group["refresh"] == "next" and group["subspace"] != "randomized":
            raise ValueError(f"subspace must be randomized with refresh='next', got {group['subspace']!r}")
        for key in ("rank", "update_proj_gap"):
            if not isinstance(group[key], int) or group[key] < 1:
                raise ValueError(f"{key} must be an integer of at least 1, got {group[key]!r}")
        for name, param in zip(names, group["params"]):
            if param.dim() != 2:
                raise ValueError(f"{name} must be a matrix to be in a group with a rank, got shape {tuple(param.shape)}")
            if group["rank"] > min(param.shape):
                raise ValueError(f"rank must be at most {min(param.shape)} for {name} of shape {tuple(param.shape)}, "
                                 f"got {group['rank']}")

    def low_rank_shape(self, group, param):
        """(left, shape of R) of a matrix in this group."""
        m, n = param.shape
        left = SIDES[group["proj_type"]](m, n)
        return left, (group["rank"], n) if left else (m, group["rank"])

    def init(self, state, param, group, index, count):
        """Add this part's state for matrix `index` of `count`; returns the shape of R."""
        m, n = param.shape
        rank, gap = group["rank"], group["update_proj_gap"]
        left, shape = self.low_rank_shape(group, param)
        state["left"] = left
        state["basis"] = param.new_zeros((m if left else n, rank))
        state["countdown"] = torch.tensor(COLD)
        if group["refresh"] == "next":
            state["basis"].copy_(seeded_basis(m if left else n, rank, group["seed"] + index, param))
            state["countdown"] -= index * min(gap, FIRST_SKETCHES) // count
        state["first_gap"] = gap if group["subspace"] == "svd" else index * gap // count + 1
        state["seed"] = group["seed"] + index
        return shape

    def refresh(self, group, grads, states, lr, left):
        """Advance the schedule of these matrices by one step; bases that are due are chosen anew."""
        moments = group["moments"]
        adam = self._transported(moments, states)
        torch.ops.lowrank.refresh_(
            [s["basis"] for s in states], grads, [s["countdown"] for s in states], *adam, lr,
            left=left, gap=group["update_proj_gap"], first_gaps=[s["first_gap"] for s in states],
            seeds=[s["seed"] for s in states], subspace=group["subspace"], moments=moments,
        )

    def _transported(self, moments, states):
        return [[s[key] for s in states] for key in ("exp_avg", "exp_avg_sq", "step")] if moments != "keep" else ([], [], [])

    def sketch_directions(self, param, state):
        """Omega of the sketch that this step's gradient of `param` owes the next basis; None if none is due."""
        if not is_due(int(state["countdown"])):
            return None
        left, basis, warm = state["left"], state["basis"], state.get("exp_avg")
        other = param.shape[1 if left else 0]
        low_rank = (basis.shape[1], other) if left else (other, basis.shape[1])
        if warm is not None and (warm.shape != low_rank or not warm.is_floating_point()):
            warm = None
        return torch.ops.lowrank.sketch_directions(basis, warm, other=other, left=left, seed=state["seed"])

    def sketch(self, grad, omega, left):
        """Y = G Omega (m, l) if left, else Omegaᵀ G (l, n); fp32."""
        return torch.ops.lowrank.project(grad, omega, left=not left)

    def refresh_from_sketches(self, group, sketches, states, lr, left):
        """Advance the schedule by one step after it was taken; what is due takes its basis from its sketch (or None)."""
        moments = group["moments"]
        sketches = [s["basis"].new_empty(0) if sketch is None else sketch for s, sketch in zip(states, sketches)]
        torch.ops.lowrank.refresh_from_sketch_(
            [s["basis"] for s in states], sketches, [s["countdown"] for s in states], *self._transported(moments, states), lr,
            left=left, gap=group["update_proj_gap"], first_gaps=[s["first_gap"] for s in states],
            seeds=[s["seed"] for s in states], moments=moments,
        )

    def measured(self, grad, state):
        """What the norm of a gradient is taken of: R."""
        return torch.ops.lowrank.project(grad, state["basis"], left=state["left"])
