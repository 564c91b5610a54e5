"""Schedules: the base, under which everything trains always, and layers that are drawn for a period."""

import random

from lowrank_sys.schedule.roles import FROZEN, TRAINED, layer_of


class Schedule:
    """Everything trains always, as its group says.

    defaults: its arguments, which are keys of every group. memory: what it remembers there, plain numbers and tuples. static:
    whether nothing ever changes. restarts: whether a new period forgets all states of matrices, not only those of other roles.
    makes_whole: whether matrices may train without their basis. reads: group keys of others. categories: of what is in states.
    """

    defaults = {}
    memory = {}
    categories = {}
    static = True
    restarts = makes_whole = False
    reads = ()

    def roles(self, groups, names):
        """[[the Role of every parameter of a group]], for groups as they are now, and names of their parameters."""
        return [[TRAINED] * len(own) for own in names]

    def begins(self, groups):
        """Whether a period begins with the next step."""
        return False

    def is_under_way(self, group):
        """Whether whoever trains in a group has done so in this period."""
        return False

    def init(self, state, param):
        """Add what it watches of a matrix that trains to its state."""

    def watch(self, gradient, state, scale, group):
        """See the gradient of a step, which is to be multiplied by `scale` (0-dim or None)."""

    def settle(self, groups, state):
        """After a step: remember in the groups what was seen. state: of the optimizer."""


class Sampled(Schedule):
    """For `period` steps `active_layers` layers have the role `drawn`, the others `rest`; then they are drawn anew.

    A layer is what `layer_of` says of the parameters in groups with a rank; all parameters with a name in it train or are frozen
    with it, and whatever else there is trains always. Draws follow from the group's `seed` and the number of the period, so that
    all ranks and all resumed runs agree. With `scores`, {layer: score}, a layer is drawn in proportion to its own, without
    replacement.

    Args:
        drawn, rest: roles.
        period: the group key that has the steps of a period.
        shares: whether roles carry the probability with which they were drawn.
        restarts: as Schedule's.
    """

    static = False
    memory = {"schedule_steps": 0}

    def __init__(self, drawn=TRAINED, rest=FROZEN, *, active_layers=2, period="period", steps=20, shares=False, restarts=False):
        self._drawn, self._rest, self._period, self._shares, self.restarts = drawn, rest, period, shares, restarts
        own, self.reads = ({"period": steps}, ()) if period == "period" else ({}, (period,))
        self.makes_whole = "whole" in (drawn.name, rest.name)
        self.defaults = {"active_layers": active_layers, "scores": None, **own}

    def begins(self, groups):
        return any(group["schedule_steps"] % group[self._period] == 0 for group in groups if "rank" in group)

    def is_under_way(self, group):
        return self._period in group and group["schedule_steps"] % group[self._period] > 0

    def roles(self, groups, names):
        matrices = [(group, own) for group, own in zip(groups, names) if "rank" in group]
        layers = list(dict.fromkeys(layer_of(name) for _, own in matrices for name in own))
        if not layers:
            return super().roles(groups, names)
        h = matrices[0][0]
        count = min(h["active_layers"], len(layers))
        drawn, rest = self._drawn, self._rest
        if self._shares:
            drawn, rest = drawn._replace(share=count / len(layers)), rest._replace(share=1 - count / len(layers))
        scores = None if h["scores"] is None else dict(h["scores"])
        chosen = draw(layers, count, scores, h.get("seed", 0), h["schedule_steps"] // h[self._period])
        role = {layer: drawn if layer in chosen else rest for layer in layers}
        plain = {layer: TRAINED if one.trains else FROZEN for layer, one in role.items()}
        of = [role if "rank" in group else plain for group in groups]
        return [[one.get(layer_of(name), TRAINED) for name in own] for one, own in zip(of, names)]


def draw(layers, count, scores, seed, turn):
    """The set of `count` layers of a turn, without replacement, in proportion to their scores (None: evenly).

    The first to arrive of exponential times at these rates. By Python's own generator: the same on every machine, and numbers
    where tensors are fake.
    """
    if scores is not None and (missing := [layer for layer in layers if layer not in scores]):
        raise ValueError(f"scores must have one for every layer, got none for {', '.join(missing)}")
    rates = {layer: 1.0 if scores is None else scores[layer] for layer in layers}
    if (able := sum(rate > 0 for rate in rates.values())) < count:
        raise ValueError(f"scores must be above 0 for {count} layers or more, got {able}")
    generator = random.Random(f"{seed} {turn}")
    times = {layer: generator.expovariate(1.0) for layer in layers}
    return set(sorted((layer for layer in layers if rates[layer] > 0), key=lambda layer: times[layer] / rates[layer])[:count])
