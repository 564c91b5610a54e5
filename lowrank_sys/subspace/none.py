"""No subspace: a matrix takes its step on the gradient itself."""

from lowrank_sys.subspace.kind import Kind
from lowrank_sys.subspace.matrices import expect_matrices


class NoSubspace(Kind):
    """Of groups with `rank` None, whose matrices have no basis. Group key: `seed`, of the random bits of INT8 weights."""

    defaults, sharded = {"seed": 0}, True
    categories = {}
    on_host = ()

    def check(self, group, names):
        if group["rank"] is not None:
            raise ValueError(f"rank must be None without a subspace, got {group['rank']!r}")
        for name, param in zip(names, group["params"]):
            expect_matrices(name, param)

    def needs(self, group):
        return {}

    def has_basis(self, group):
        return False

    def init(self, state, param, group, index, count):
        return param.shape
