"""A moment of rank r kept as its singular triples: vectors of both sides, and no basis that a gradient goes through."""

import torch

from lowrank_sys.subspace.iteration import seeded_basis
from lowrank_sys.subspace.none import NoSubspace


class Factors(NoSubspace):
    """Group keys: `rank`, and `seed` of the vectors before the first gradient.

    State of a matrix (m, n): `left_vectors` (m, r), `values` (r,), `right_vectors` (n, r), fp32; `started`, whether they are of a
    gradient, on the host.
    """

    defaults = {"seed": 0}
    categories = {**dict.fromkeys(("left_vectors", "values", "right_vectors"), "moments"), "started": "counters"}
    on_host = ("started",)
    capturable, for_remainder = False, True
    unsharded = "its vectors of the left side are of all rows"

    def check(self, group, names):
        self.check_rank(group, names)

    def init(self, state, param, group, index, count):
        (m, n), rank, like = param.shape, group["rank"], param.new_empty(0, dtype=torch.float32)
        state["seed"] = group["seed"] + index
        state["left_vectors"] = seeded_basis(m, rank, state["seed"], like)
        state["values"] = like.new_zeros(rank)
        state["right_vectors"] = seeded_basis(n, rank, state["seed"] + 1, like)
        state["started"] = torch.tensor(0, device="cpu")
        return param.shape
