"""The subspace part of an optimizer: which side is projected, the basis a matrix keeps, and its refresh schedule."""

import torch

from lowrank_sys._ops.subspace import MOMENTS, SUBSPACES
from lowrank_sys.reference.subspace import seeded_basis
from lowrank_sys.subspace.basis import DENSE, Int4, alike, chosen, load, parts, store_of
from lowrank_sys.subspace.gap import new_overlaps
from lowrank_sys.subspace.moments import first_moment
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

    `quant` keeps the basis in INT4 (`quant_n_bit` = 4) in groups of `quant_group_size` entries of a vector. With a
    `cos_threshold` the gap of each matrix is its own: it starts as `update_proj_gap` and is multiplied by `gamma_proj`, up to
    `max_update_proj_gap` (None: 16 update_proj_gap), at every refresh whose subspace and the `queue_size` - 1 before it overlap
    with their predecessors by cos_threshold or more in the mean (Q-GaLore, lowrank_sys.subspace.gap). Two random subspaces
    overlap by r/d. This rule reads the overlaps: with a GPU, the host waits in a step that refreshes, and in no other.

    `int8_gemm` quantises the operands of the step's two products to INT8 on the fly (docs/kernels/int8-products.md); a basis is
    chosen in fp32 all the same.

    State of a matrix: `basis` (m or n, r) in the parameter's dtype, or packed with `basis_scale`, `basis_offset` and
    `group_size`; `left`; `countdown`, steps until the next refresh, on the host; `first_gap` and `seed`; with a cos_threshold
    `gap`, on the host, and `overlaps`, the queue.
    """

    defaults = {
        "update_proj_gap": 200,
        "proj_type": "std",
        "subspace": "randomized",
        "moments": "keep",
        "seed": 0,
        "refresh": "now",
        "quant": False,
        "quant_n_bit": 4,
        "quant_group_size": 256,
        "cos_threshold": None,
        "gamma_proj": 2,
        "queue_size": 5,
        "max_update_proj_gap": None,
        "int8_gemm": False,
    }
    categories = {**DENSE.categories, **Int4.categories, "countdown": "counters", "gap": "counters", "overlaps": "counters"}
    on_host = ("countdown", "gap")  # state that stays there, for Python to read
    subspaces, transports, refreshes = SUBSPACES, MOMENTS, REFRESHES  # values of the keys

    def check(self, group, names):
        """Raise a ValueError that names the key, or the weight that does not fit."""
        for key, valid in (
            ("proj_type", SIDES),
            ("subspace", self.subspaces),
            ("moments", self.transports),
            ("refresh", self.refreshes),
        ):
            if group[key] not in list(valid):
                raise ValueError(f"{key} must be one of {', '.join(valid)}, got {group[key]!r}")
        if group["refresh"] == "next" and group["subspace"] != "randomized":
            raise ValueError(f"subspace must be randomized with refresh='next', got {group['subspace']!r}")
        if "quant" in self.defaults:
            self._check_quantized(group)
            self._check_adaptive(group)
        if group.get("int8_gemm") and group.get("quant"):
            raise ValueError("int8_gemm must be False with quant: a basis in INT4 has products of its own")
        for name, param in zip(names, group["params"]):
            if param.dim() != 2:
                raise ValueError(f"{name} must be a matrix to be in a group with a rank, got shape {tuple(param.shape)}")
            if group["rank"] > min(param.shape):
                raise ValueError(
                    f"rank must be at most {min(param.shape)} for {name} of shape {tuple(param.shape)}, got {group['rank']}"
                )

    def _check_quantized(self, group):
        if group["quant"] and group["quant_n_bit"] != 4:
            raise ValueError(f"quant_n_bit must be 4, got {group['quant_n_bit']!r}")
        size = group["quant_group_size"]
        if group["quant"] and not (isinstance(size, int) and 32 <= size <= 1024 and size & (size - 1) == 0):
            raise ValueError(f"quant_group_size must be a power of two from 32 to 1024, got {size!r}")

    def _check_adaptive(self, group):
        if group["cos_threshold"] is None:
            return
        most = group["max_update_proj_gap"]
        if most is not None and most < group["update_proj_gap"]:
            raise ValueError(
                f"max_update_proj_gap must be an integer of at least update_proj_gap = {group['update_proj_gap']}, got {most!r}"
            )

    def low_rank_shape(self, group, param):
        """(left, shape of R) of a matrix in this group."""
        m, n = param.shape
        left = SIDES[group["proj_type"]](m, n)
        return left, (group["rank"], n) if left else (m, group["rank"])

    def shape_of(self, param, state):
        """The shape of R that a state is for, which may be loaded."""
        store, tensors = parts(state)
        m, n = param.shape
        return (store.rank(*tensors), n) if state["left"] else (m, store.rank(*tensors))

    def fits(self, param, state):
        """Whether a state is one of a matrix like `param`."""
        if "basis" not in state:
            return True
        store, tensors = parts(state)
        return param.dim() == 2 and store.fits(param.shape[0 if state["left"] else 1], *tensors)

    def init(self, state, param, group, index, count):
        """Add this part's state for matrix `index` of `count`; returns the shape of R."""
        m, n = param.shape
        rank, gap = group["rank"], group["update_proj_gap"]
        left, shape = self.low_rank_shape(group, param)
        state["left"] = left
        d, store = m if left else n, chosen(group)
        tensors = store.make(d, rank, param)
        state.update(zip(store.keys, tensors))
        state.update(store.options)
        state["countdown"] = torch.tensor(COLD, device="cpu")
        if group["refresh"] == "next":
            store.write(*tensors, new=seeded_basis(d, rank, group["seed"] + index, param))
            state["countdown"] -= index * min(gap, FIRST_SKETCHES) // count
        state["first_gap"] = gap if group["subspace"] == "svd" else index * gap // count + 1
        state["seed"] = group["seed"] + index
        if group["cos_threshold"] is not None:
            state["gap"] = torch.tensor(gap, device="cpu")
            state["overlaps"] = new_overlaps(group["queue_size"], param.device)
        return shape

    def project(self, group, grad, state):
        """R of a full gradient."""
        store, tensors = parts(state)
        options = {"int8_gemm": True} if group["int8_gemm"] else {}
        return store.project(grad, *tensors, left=state["left"], **options)

    def refresh(self, group, grads, states, lr, left):
        """Advance the schedule of these matrices by one step; bases that are due are chosen anew."""
        for kind, states, grads in alike(_kind(group), states, grads):
            torch.ops.lowrank.refresh_.full(
                _field(states, "basis"),
                grads,
                _field(states, "countdown"),
                *self._transported(group["moments"], states),
                lr,
                left=left,
                subspace=group["subspace"],
                **_options(group, kind, states),
            )

    def sketch_directions(self, param, state):
        """Omega of the sketch that this step's gradient of `param` owes the next basis; None if none is due."""
        if not is_due(int(state["countdown"])):
            return None
        left, warm = state["left"], first_moment(state)
        if warm is not None and tuple(warm.shape) != self.shape_of(param, state):
            warm = None
        basis = load(state, param).to(param.dtype)
        return torch.ops.lowrank.sketch_directions(basis, warm, other=param.shape[1 if left else 0], left=left, seed=state["seed"])

    def sketch(self, grad, omega, left):
        """Y = G Omega (m, l) if left, else Omegaᵀ G (l, n); fp32."""
        return torch.ops.lowrank.project(grad, omega, left=not left)

    def refresh_from_sketches(self, group, sketches, states, lr, left):
        """Advance the schedule by one step after it was taken; what is due takes its basis from its sketch (or None)."""
        sketches = [s["basis"].new_empty(0) if sketch is None else sketch for s, sketch in zip(states, sketches)]
        for kind, states, sketches in alike(_kind(group), states, sketches):
            torch.ops.lowrank.refresh_from_sketch_.full(
                _field(states, "basis"),
                sketches,
                _field(states, "countdown"),
                *self._transported(group["moments"], states),
                lr,
                left=left,
                **_options(group, kind, states),
            )

    def _transported(self, moments, states):
        """The Adam state, in lists that are empty where nothing is transported."""
        return [_field(states, key) if moments != "keep" else [] for key in ("exp_avg", "exp_avg_sq", "step")]

    def measured(self, group, grad, state):
        """What the norm of a gradient is taken of: R."""
        return self.project(group, grad, state)

    def describe(self, state):
        """The schedule of a matrix in plain numbers: its gap, steps until the next refresh, and the overlaps. Reads the device."""
        if "gap" not in state:
            return {"countdown": max(int(state["countdown"]), 0)}
        overlaps = [value for value in state["overlaps"].tolist() if value == value]
        return {"gap": int(state["gap"]), "countdown": max(int(state["countdown"]), 0), "overlaps": overlaps}


def _kind(group):
    """What states of one call of a refresh have in common: the basis' store, whether a gap is its own, and 8-bit moments."""
    transported, adaptive = group["moments"] != "keep", group["cos_threshold"] is not None

    def kind(state):
        return state.get("group_size", 0), adaptive and "gap" in state, transported and "exp_avg_absmax" in state

    return kind


def _field(states, key):
    return [state[key] for state in states]


def _options(group, kind, states):
    """The other arguments of a refresh, of states of one kind."""
    group_size, own_gap, coded = kind
    gap = group["update_proj_gap"]
    options = {"gap": gap, "first_gaps": _field(states, "first_gap"), "seeds": _field(states, "seed"), "moments": group["moments"]}
    for key, present in {
        "basis_scale": group_size,
        "basis_offset": group_size,
        "exp_avg_absmax": coded,
        "exp_avg_sq_absmax": coded,
        "gap": own_gap,
    }.items():
        plural = f"{key}{'es' if key.endswith('x') else 's'}"
        options[plural] = _field(states, key) if present else []
    options["overlaps"] = _field(states, "overlaps") if own_gap else []
    if group_size:
        options |= store_of(states[0]).options
    if own_gap:
        most = group["max_update_proj_gap"]
        options |= {
            "cos_threshold": group["cos_threshold"],
            "gamma_proj": group["gamma_proj"],
            "max_gap": 16 * gap if most is None else most,
        }
    return options
