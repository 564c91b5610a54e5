"""What every kind of subspace is to an optimizer: which side is projected, the basis a matrix keeps, and its schedule."""

import torch

from lowrank_sys.subspace import moments as stored
from lowrank_sys.subspace.basis import axis_of, store_of
from lowrank_sys.subspace.matrices import expect_matrices, matrix_shape
from lowrank_sys.subspace.rank import of_parameter, wanted
from lowrank_sys.subspace.refresh import KINDS
from lowrank_sys.subspace.shards import Part
from lowrank_sys.subspace.transport import TRANSPORTS

# proj_type -> whether the basis lies on the left of a matrix (m, n). 'std' follows the GaLore reference; 'short-moments'
# puts the basis on the long side and the moments on the short one.
SIDES = {
    "std": lambda m, n: m < n,
    "reverse_std": lambda m, n: m >= n,
    "left": lambda m, n: True,
    "right": lambda m, n: False,
    "short-moments": lambda m, n: m >= n,
}

# Integers of a state that differ between matrices.
NUMBERS = ("first_gap", "seed", "parameter", "d", "offset", "rows")
# Steps over which refresh='next' spreads the first sketches of a model.
FIRST_SKETCHES = 4


class Kind(Part):
    """Base of the kinds of subspaces: all settings are group keys, all state is tensors and plain numbers.

    A subclass says what a state holds (`init`), how a basis that is due is renewed (`renew`), and of the group keys `subspace`,
    `moments` and `refresh` which values it serves.
    """

    defaults = {"update_proj_gap": 200, "refresh_every": 1, "proj_type": "std", "moments": "keep", "seed": 0, "refresh": "now"}
    categories = {"countdown": "counters"}
    on_host = ("countdown",)  # state that stays there, for Python to read
    hyper = ("update_proj_gap", "refresh_every")  # group keys that a refresh reads, numbers
    blind = False  # whether a basis is renewed without any gradient
    capturable = True  # whether a step reads nothing of a basis on the host
    sketched = False  # whether bases may come from sketches, which add up over micro-batches
    fusable = True  # whether R is project(G), as fused steps and remainders take it
    empties = False  # whether there are matrices of whose gradient nothing is in R
    for_remainder = False  # whether a remainder is all that reads what it keeps

    def __init_subclass__(cls):
        super().__init_subclass__()
        KINDS[cls.__name__] = cls()

    # What a group asks for.

    def selections(self):
        """Names that the group key `subspace` may have."""
        return ()

    def transports(self, group):
        """Names that the group key `moments` may have."""
        return tuple(TRANSPORTS)

    def check(self, group, names):
        """Raise a ValueError that names the key, or the weight that does not fit."""
        valid = {"proj_type": tuple(SIDES), "subspace": self.selections(), "moments": self.transports(group)}
        valid["refresh"] = ("now", "next") if self.sketched else ("now",)
        for key, values in valid.items():
            if values and group[key] not in values:
                raise ValueError(
                    f"{key} must be one of {', '.join(values)}, got {group[key]!r}, which {type(self).__name__} does not serve"
                )
        self.check_rank(group, names)

    def check_rank(self, group, names):
        """Raise a ValueError for a group without a rank, or with one that a weight does not have."""
        if group["rank"] is None:
            raise ValueError(f"rank must be {wanted(None)}")
        for i, (name, param) in enumerate(zip(names, group["params"])):
            expect_matrices(name, param)
            rank, most = of_parameter(group, i)["rank"], min(matrix_shape(param.shape))
            if rank > most:
                raise ValueError(f"rank must be at most {most} for {name} of shape {tuple(param.shape)}, got {rank}")

    def check_sharded(self, group):
        """Raise a ValueError that names a key whose value does not serve matrices whose rows lie on several processes."""
        if not self.sharded:
            raise ValueError(f"{type(self).__name__} does not serve sharded weights: {self.unsharded}")
        if "moments" in group and not TRANSPORTS[group["moments"]].sharded:
            able = ", ".join(name for name in self.transports(group) if TRANSPORTS[name].sharded)
            raise ValueError(f"moments must be one of {able} for sharded weights, got {group['moments']!r}")

    # What a matrix keeps.

    def init(self, state, param, group, index, count):
        """Add this part's state for matrix `index` of `count`; returns the shape of R."""
        raise NotImplementedError

    def begin(self, state, param, group, index, count, role):
        """`init` for a matrix in this role (lowrank_sys.schedule.roles): without a basis where it trains whole."""
        return param.shape if role.name == "whole" else self.init(state, param, group, index, count)

    def has_basis(self, group):
        """Whether the gradients of this group go through a basis."""
        return True

    def is_whole(self, state):
        """Whether R of this matrix is of the weight's own shape, and needs no way back."""
        return store_of(state) is None

    def low_rank_shape(self, group, param):
        """(left, shape of R) of a matrix in this group."""
        m, n = param.shape
        left = SIDES[group["proj_type"]](m, n)
        return left, (group["rank"], n) if left else (m, group["rank"])

    def shape_of(self, param, state):
        """The shape of R that a state is for, which may be loaded."""
        if self.is_whole(state):
            return param.shape
        rank, (m, n) = store_of(state).rank(state), param.shape
        return (rank, n) if state["left"] else (m, rank)

    def fits(self, param, state):
        """Whether a state is one of a matrix like `param`."""
        store = store_of(state)
        return store is None or (param.dim() == 2 and store.fits(axis_of(param.shape, state), state))

    def placed(self, key, value, device):
        """A loaded tensor of a state of a weight on `device`, where it belongs."""
        if key not in self.on_host:
            return value.to(device)
        value = value.to("cpu")
        return value.pin_memory() if key == "missed" and device.type == "cuda" else value

    # What a step asks for.

    def project(self, group, grad, state):
        """R of a full gradient."""
        return store_of(state).project(grad, state, int8_gemm=group.get("int8_gemm", False))

    def measured(self, group, grad, state):
        """What the norm of a gradient is taken of: R."""
        return grad if store_of(state) is None else self.project(group, grad, state)

    def sketch_directions(self, param, state, warm):
        """Omega of the sketch that this step's gradient of `param` owes the next basis; None if none is due.

        warm: the first moment of R's shape, or None.
        """
        return None

    def sketch(self, grad, omega, left):
        """Y = G Omega (m, l) if left, else Omegaᵀ G (l, n); fp32."""
        return torch.ops.lowrank.project(grad, omega, left=not left)

    def advance(self, group, gradients, states, lr, left, moments, *, sketched=False, grad_scale=None, found_inf=None):
        """Advance the schedule of these matrices, whose states have the same keys, by one step; bases that are due are chosen anew.

        gradients: G each, or with `sketched` a sketch or None. moments: {name: whether it has a sign} of R's shape.
        grad_scale, found_inf: what gradients are to be multiplied by, and nonzero where the step is none (one element each).
        """
        if sketched:
            gradients = [s["step"].new_empty(0) if g is None else g for s, g in zip(states, gradients)]
        transport = group["moments"]
        carried = (*moments, "step", *TRANSPORTS[transport].needs) if transport != "keep" else ()
        reads = tuple(dict.fromkeys(key for key in (*carried, *self.reads(group)) if key not in self.categories))
        hyper = {key: group[key] for key in self.hyper_of(group) if group[key] is not None}
        hyper.update(zip(("beta1", "beta2"), group["betas"] if "betas" in group and reads else ()))
        keys, number_keys = self.keys_of(states[0], reads)
        tensors = [state[key] for state in states for key in keys]
        numbers = [state[key] for state in states for key in number_keys]
        torch.ops.lowrank.refresh_(
            tensors, gradients, numbers, lr, kind=type(self).__name__, select=group.get("subspace", ""), transport=transport,
            keys=keys, number_keys=number_keys, moments=list(moments), signed=list(moments.values()), hyper_keys=list(hyper),
            hyper=[float(value) for value in hyper.values()], left=left, sketched=sketched,
            sums=states[0].get("sums", ""), grad_scale=grad_scale, found_inf=found_inf,
        )  # fmt: skip

    def more_defaults(self, group):
        """Defaults of the keys that what a group has chosen asks for."""
        return {}

    def needs(self, group):
        """{group key: names of the state that the part it names reads}."""
        return {"moments": TRANSPORTS[group["moments"]].needs}

    def reads(self, group):
        """Keys of the state that choosing a basis reads beside its own: moments by name, 'step'."""
        return ()

    def late(self, group):
        """Whether bases, but for the first, are chosen after the step."""
        return False

    def hyper_of(self, group):
        return self.hyper

    def keys_of(self, state, reads):
        """(tensors, integers) of a state that a refresh takes: its own, and the moments and the step in `reads`."""
        tensors = [key for key in self.categories if key in state]
        names = [name for name in reads if name != "step"]
        more = [*stored.keys(state, names), *(["step"] if "step" in reads else [])]
        numbers = [key for key in (*NUMBERS, "group_size") if key in state]
        return (*tensors, *more), tuple(numbers)

    # What `refresh_` asks for.

    def expect(self, due):
        """Raise an error for a matrix whose gradient its basis does not fit."""

    def renew(self, due):
        """Choose the basis of a matrix that is due and carry its moments over; whether it could be taken."""
        raise NotImplementedError

    def settle(self, taken):
        """All that is due was renewed; `taken`: what got a new basis."""

    def gap(self, due):
        """Steps until the next refresh of a matrix that was renewed."""
        return self.aligned(due, due.state["first_gap"] if due.first else int(due.h["update_proj_gap"]))

    def aligned(self, due, gap):
        """A gap that ends in a step that may refresh: with `refresh_every` the next of every so many, from the first refresh on."""
        every = int(due.h.get("refresh_every", 1))
        return -(-gap // every) * every

    def first_wait(self, group, index, count):
        """Steps that matrix `index` of `count` waits for its first sketch, which is as large as a gradient's projection."""
        return index * min(group["update_proj_gap"], FIRST_SKETCHES) // count if group["refresh_every"] == 1 else 0

    def describe(self, state):
        """The schedule of a matrix in plain numbers: steps until the next refresh. Reads the device."""
        return {"countdown": max(int(state["countdown"]), 0)}
