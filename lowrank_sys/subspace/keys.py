"""A subspace whose basis is Gaussian and made from its key where it is used, or, by choice, one in memory."""

import torch

from lowrank_sys._ops.rules import expect_dtype, expect_like
from lowrank_sys.subspace.basis import KEY, axis_of
from lowrank_sys.subspace.kind import Kind
from lowrank_sys.subspace.orthonormal import Orthonormal
from lowrank_sys.subspace.refresh import OP, expect_carried, expect_named
from lowrank_sys.subspace.transport import TRANSPORTS

PROJECTIONS = ("random", "svd")
# There is no product of two such bases to rotate by.
CARRIED = ("keep", "reset")


class Gaussian(Kind):
    """A Gaussian basis owes the gradient nothing: a refresh only counts in its key, and all matrices do so in the same step.

    State of a matrix: `key`, int64 (4,) on its device: seed, refresh, parameter, first row; `left`; `countdown`, on the host.
    """

    categories = {**Kind.categories, **KEY.categories}
    blind = sketched = sharded = True

    def transports(self, group):
        return CARRIED

    def init(self, state, param, group, index, count):
        state["left"], shape = self.low_rank_shape(group, param)
        state["key"] = torch.tensor([group["seed"], 0, index, 0], device=self._place(param))
        # with 'next' the schedule advances after the step
        state["countdown"] = torch.tensor(group["update_proj_gap"] - (group["refresh"] == "next"), device="cpu")
        return shape

    def needs(self, group):
        """The rank is read of it: a key does not know it."""
        return {"rank": ("exp_avg",), **super().needs(group)}

    def _place(self, tensor):
        """Where the key of a matrix is whose weight or gradient is `tensor`."""
        return torch.device("cpu") if "key" in self.on_host else tensor.device

    def gap(self, due):
        return int(due.h["update_proj_gap"])

    def measured(self, group, grad, state):
        """|R| is |G| on average, and G is there."""
        return grad

    def expect(self, due):
        expect_named(due, "key")
        key = due.state["key"]
        expect_like(OP, "key", key, (4,), self._place(due.raw))
        expect_dtype(OP, "key", key, torch.int64)
        expect_carried(due, (None, None), due.raw.device)

    def renew(self, due):
        if due.training:
            due.state["key"][1] += 1
            TRANSPORTS[due.transport].carry(due, None, None, None)
        return True


class Resampled(Gaussian):
    """One Gaussian basis after another (Flora): moments are decompressed by the old and compressed by the new, M <- B_newᵀ B_old M.

    A refresh makes both (d, r) in fp32, and drops them. State of a matrix: that of Gaussian, its key on the host, and d.
    """

    defaults, capturable, sharded = {**Kind.defaults, "update_proj_gap": 1000, "moments": "rotate"}, False, True
    on_host = (*Gaussian.on_host, "key")

    def transports(self, group):
        return ("rotate", *CARRIED)

    def init(self, state, param, group, index, count):
        shape = super().init(state, param, group, index, count)
        state["d"] = axis_of(param.shape, state)
        return shape

    def renew(self, due):
        transport = TRANSPORTS[due.transport]
        old = KEY.load(due.state, due.state["d"]) if transport.bases and due.training else None
        if old is None:
            return super().renew(due)
        due.state["key"][1] += 1
        transport.carry(due, old, KEY.load(due.state, due.state["d"]), torch.zeros((), dtype=torch.bool, device=old.device))
        return True


class Keyed(Orthonormal):
    """Group key `proj` (APOLLO's): 'random', a Gaussian basis that is never in memory; 'svd', Orthonormal's."""

    defaults = {**Orthonormal.defaults, "proj": "random"}
    categories = {**Orthonormal.categories, **Gaussian.categories}
    sharded = True

    def _of(self, group):
        """Which of the two a group asks for."""
        return GAUSSIAN if group["proj"] == "random" else ORTHONORMAL

    def check(self, group, names):
        if group["proj"] not in PROJECTIONS:
            raise ValueError(f"proj must be one of {', '.join(PROJECTIONS)}, got {group['proj']!r}")
        if group["proj"] == "random" and group["moments"] in set(TRANSPORTS) - set(CARRIED):
            raise ValueError(
                f"moments must be one of {', '.join(CARRIED)} with proj='random', got {group['moments']!r}, which "
                f"{type(self).__name__} does not serve"
            )
        super().check(group, names)

    def check_sharded(self, group):
        self._of(group).check_sharded(group)

    def needs(self, group):
        return self._of(group).needs(group)

    def init(self, state, param, group, index, count):
        return self._of(group).init(state, param, group, index, count)

    def measured(self, group, grad, state):
        return self._of(group).measured(group, grad, state)

    def sketch_directions(self, param, state, warm):
        return None if "key" in state else super().sketch_directions(param, state, warm)

    def advance(self, group, *arguments, **options):
        self._of(group).advance(group, *arguments, **options)


GAUSSIAN, ORTHONORMAL = Gaussian(), Orthonormal()
