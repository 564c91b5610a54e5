"""GUM (Pan et al. 2025, arXiv:2510.17802): Muon in the subspace, and in a few layers on what the subspace leaves out."""

from lowrank_sys.optim.preset import Preset, method
from lowrank_sys.optim.rules import Muon
from lowrank_sys.schedule.roles import TRAINED, WHOLE
from lowrank_sys.schedule.schedule import Sampled
from lowrank_sys.subspace.basis import store_of
from lowrank_sys.subspace.orthonormal import Orthonormal


class Unbiased(Orthonormal):
    """R is project(G) / (1 - q), or in a whole matrix (G - back(project(G))) / q; q is the probability of being whole.

    State of a matrix: that of Orthonormal, `share`, q or 1 - q, and `outside` in a whole one.
    """

    fusable = False
    unsharded = "its layers are drawn, and frozen weights are not sharded ones"
    sketched = False  # a basis serves from the step on whose gradient it is of

    def transports(self, group):
        return ("keep",)  # with a basis goes all else of a period

    def begin(self, state, param, group, index, count, role):
        shape = self.init(state, param, group, index, count)
        state["first_gap"] = group["update_proj_gap"]  # no refresh inside of a period
        state["share"] = 1.0 if role.share is None else role.share
        if role.name != "whole":
            return shape
        state["outside"] = True
        return param.shape

    def is_whole(self, state):
        return "outside" in state

    def project(self, group, grad, state):
        r = super().project(group, grad, state)
        if self.is_whole(state):
            inside, r = r, grad.float().clone()
            store_of(state).back_(r, inside, state, alpha=-1.0)
        return r.div_(state["share"])


class HeavyBall(Muon):
    sharded = True
    name, defaults = "heavy-ball-muon", {**Muon.defaults, "nesterov": False}


@method("gum", lr=1e-2, plain_lr=3e-3, scale=1.0)
class GUM(Preset):
    """W <- (1 - lr*wd) W - lr back(X), X = 0.2 sqrt(max(rows, columns)) NS(M), M the momentum of project(G) / (1 - q).

    In `active_layers` (1) layers, drawn for a period, W <- (1 - lr*wd) W - lr X from M of (G - back(project(G))) / q instead, q the
    share of these layers: in the mean nothing of G is left out. A period has `update_proj_gap` (200) steps; bases, moments and the
    layers are new with it. The paper draws each layer by itself, here their number is fixed, and so is the memory; its steps have
    no factor 0.2 sqrt(...), of which Muon says more. NS does not see the weights 1/q within a period. Group keys: those of
    GaLoreAdamW. Arguments: Muon's, with `nesterov` False.
    State of a matrix: `exp_avg` of R's shape, in a drawn layer of its own, and the basis and its schedule.
    """

    rule, subspace = HeavyBall(), Unbiased()
    low_rank_defaults = {"scale": 1.0}
    schedule = Sampled(WHOLE, TRAINED, active_layers=1, period="update_proj_gap", shares=True, restarts=True)
