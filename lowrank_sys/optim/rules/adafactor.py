"""Adafactor (Shazeer and Stern 2018), on the full gradient or in a subspace as GaLore's GaLoreAdafactor."""

import math

import torch

from lowrank_sys.optim import hyper
from lowrank_sys.optim.moments import Moment
from lowrank_sys.optim.rules.rule import Rule
from lowrank_sys.subspace.shards import WHOLE


def rms(x, shard):
    rows = shard.rows or (x.shape[0] if x.dim() else 1)
    return shard.norms(torch.linalg.vector_norm(x)) / math.sqrt(max(rows * math.prod(x.shape[1:]), 1))


def _mean_over(x, ok, dim, shard):
    """(mean along `dim` of the entries where ok (broadcast along the other axis), how many they are). Divides first: the sum may
    overflow. shard: that a sum along `dim` is over."""
    ok = ok.expand_as(x)
    count = shard.sum(ok.sum(dim, keepdim=True))
    return shard.sum((torch.where(ok, x, 0) / count.clamp(min=1)).sum(dim, keepdim=True)), count


def inverse_root(statistic):
    """0 where there is no statistic yet: what was left out from the first step on has none."""
    return torch.where(statistic > 0, statistic.rsqrt(), 0)


class Adafactor(Rule):
    """R over the root of its factored second moments, clipped by its RMS and scaled by the rate before the first moment.

    `beta1=None` keeps no first moment. With `relative_step` the rate follows the step count; with `scale_parameter` it is
    multiplied by the RMS of the weight.
    """

    name, sharded = "adafactor", True
    defaults = {"eps": (1e-30, 1e-3), "clip_threshold": 1.0, "decay_rate": -0.8, "beta1": None}
    defaults |= {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    checks = {
        "lr": hyper.optional(hyper.rate),
        "eps": hyper.pair("eps", hyper.at_least(0)),
        "clip_threshold": hyper.number("a number above 0", lambda value: value > 0),
        "decay_rate": hyper.number("a number", lambda value: True),
        "beta1": hyper.optional(hyper.momentum),
        "scale_parameter": hyper.flag,
        "relative_step": hyper.flag,
        "warmup_init": hyper.flag,
    }
    names = ("exp_avg", "exp_avg_sq", "row", "col")

    @property
    def transports(self):
        return ("keep",)

    def moments(self, shape, h):
        first = {} if h["beta1"] is None else {"exp_avg": Moment(signed=True)}
        if len(shape) == 2:
            return {**first, "row": Moment(signed=False, axis=0), "col": Moment(signed=False, axis=1)}
        return {**first, "exp_avg_sq": Moment(signed=False)}

    def rate(self, lr, s, h):
        if h["relative_step"]:
            lr = torch.minimum(1e-6 * s.step if h["warmup_init"] else torch.full_like(s.step, 1e-2), s.step.rsqrt())
        return lr * s.weight_rms().clamp(min=h["eps"][1]) if h["scale_parameter"] else lr

    def rates(self, lr, s, h):
        return self.rate(lr, s, h), 1.0

    def update(self, r, s, h):
        square = r.square() + h["eps"][0]
        beta2 = 1 - s.step ** h["decay_rate"]
        if r.dim() == 2:
            update = self._preconditioned(r, square, s, beta2)
        else:
            s.exp_avg_sq = beta2 * s.exp_avg_sq + (1 - beta2) * square
            update = r * inverse_root(s.exp_avg_sq)
        update = update * (s.rate / (rms(update, s.shard) / h["clip_threshold"]).clamp(min=1))
        if h["beta1"] is not None:
            s.exp_avg = h["beta1"] * s.exp_avg + (1 - h["beta1"]) * update
            update = s.exp_avg
        return update

    def _preconditioned(self, r, square, s, beta2):
        """R over the root of the estimate row col / mean(row), factor by factor: the estimate itself leaves fp32 where some rows
        are zero and others large."""
        for name, dim, shard in (("row", -1, WHOLE), ("col", -2, s.shard)):
            (mean, count), old = _mean_over(square, s.ok, dim, shard), getattr(s, name)
            setattr(s, name, torch.where(count > 0, beta2 * old + (1 - beta2) * mean, old))
        row, col = s.row, s.col
        mean = s.shard.sum((row / max(s.shard.rows or row.shape[-2], 1)).sum(dim=-2, keepdim=True))
        return (r * inverse_root(row)) * (mean.sqrt() * inverse_root(col))
