"""A subspace where a group has a rank, and the gradient itself where its rank is None."""

from lowrank_sys.subspace.none import NoSubspace
from lowrank_sys.subspace.orthonormal import Orthonormal

NONE = NoSubspace()


class OrWhole(Orthonormal):
    """Orthonormal with an integer `rank`, NoSubspace with None."""

    sharded = True

    def check(self, group, names):
        if group["rank"] is not None:
            super().check(group, names)
            return
        if group["refresh"] != "now":
            raise ValueError(f"rank must be an integer of at least 1 with refresh={group['refresh']!r}, got None")
        NONE.check(group, names)

    def check_sharded(self, group):
        if group["rank"] is not None:
            super().check_sharded(group)

    def has_basis(self, group):
        return group["rank"] is not None

    def needs(self, group):
        return {} if group["rank"] is None else super().needs(group)

    def init(self, state, param, group, index, count):
        return param.shape if group["rank"] is None else super().init(state, param, group, index, count)
