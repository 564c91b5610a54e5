"""Rules of one moment, or of none."""

from lowrank_sys.optim.moments import Moment
from lowrank_sys.optim.rules.adam import Adam
from lowrank_sys.optim.rules.rule import Rule


class Lion(Rule):
    """X = sign(beta1 M + (1 - beta1) R), then M <- beta2 M + (1 - beta2) R (Chen et al. 2023, arXiv:2302.06675)."""

    name, sharded = "lion", True
    defaults = {"betas": (0.9, 0.99)}
    state = {"exp_avg": Moment(signed=True)}

    def update(self, r, s, h):
        beta1, beta2 = h["betas"]
        x = s.exp_avg.lerp(r, 1 - beta1).sign()
        s.exp_avg.lerp_(r, 1 - beta2)
        return x


class Momentum(Rule):
    """X = M <- momentum M + (1 - momentum) R; with momentum 0 no state."""

    name, sharded = "momentum", True
    defaults = {"momentum": 0.9}
    state = {"exp_avg": Moment(signed=True)}

    def moments(self, shape, h):
        return self.state if h["momentum"] > 0 else {}

    def returns_gradient(self, h):
        return h["momentum"] == 0

    def update(self, r, s, h):
        if h["momentum"] == 0:
            return r
        s.exp_avg.lerp_(r, 1 - h["momentum"])
        return s.exp_avg.clone()


class Unchanged(Rule):
    """X = R, without a state."""

    name, sharded = "unchanged", True

    def returns_gradient(self, h):
        return True

    def update(self, r, s, h):
        return r


class NoRule(Unchanged):
    """Matrices have no rule; all else has AdamW."""

    plain, sharded = Adam(), True
