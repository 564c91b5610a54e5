"""Adam (Kingma and Ba 2015) with the order of torch.optim.AdamW, and its ratio without bias correction."""

import torch

from lowrank_sys.optim.moments import Moment
from lowrank_sys.optim.rules.rule import Rule


def corrections(s, h):
    """1 - beta1^t and 1 - beta2^t, 0-dim fp64. By expm1: 1 - beta**t loses half of fp32's digits at the first steps."""
    step = s.step.double()
    return [
        -torch.expm1(step * torch.log(torch.full_like(step, beta))) if beta > 0 else torch.ones_like(step) for beta in h["betas"]
    ]


class Adam(Rule):
    """X = (M / (1 - beta1^t)) / (sqrt(V / (1 - beta2^t)) + eps)."""

    name, sharded = "adam", True
    defaults = {"betas": (0.9, 0.999), "eps": 1e-8}
    state = {"exp_avg": Moment(signed=True), "exp_avg_sq": Moment(signed=False)}

    def advance(self, r, s, h):
        beta1, beta2 = h["betas"]
        s.exp_avg = beta1 * s.exp_avg + (1 - beta1) * r
        s.exp_avg_sq = beta2 * s.exp_avg_sq + (1 - beta2) * r * r

    def update(self, r, s, h):
        self.advance(r, s, h)
        first, second = (correction.to(r.dtype) for correction in corrections(s, h))
        return (s.exp_avg / first) / ((s.exp_avg_sq / second).sqrt() + h["eps"])


class RatioAdam(Adam):
    """N = M / (sqrt(V) + eps), at the rate lr sqrt(1 - beta2^t) / (1 - beta1^t): the eps of the code of Fira and APOLLO."""

    name, sharded = "ratio-adam", True
    defaults = {"betas": (0.9, 0.999), "eps": 1e-6}

    @property
    def plain(self):
        return Adam()

    def rates(self, lr, s, h):
        first, second = corrections(s, h)
        return lr, lr * (second.sqrt() / first)

    def update(self, r, s, h):
        self.advance(r, s, h)
        return s.exp_avg / (s.exp_avg_sq.sqrt() + h["eps"])
