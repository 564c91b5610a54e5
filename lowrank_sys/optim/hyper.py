"""What the keys of a parameter group may hold: checked, and made plain numbers, when an optimizer is built.

A rule takes a value and returns it as a plain number, a tuple of them, or the tensor that it is; it raises a ValueError that says
what it wants where the value is none.
"""

import math
import numbers

import torch

from lowrank_sys.subspace.rank import expect_rank, wanted


def plain(value):
    """numpy's scalars and 0-dim tensors as Python's numbers; whatever else as it is."""
    return value.item() if isinstance(value, torch.Tensor) and value.dim() == 0 else value


def integer(least, most=math.inf):
    wanted = f"an integer of at least {least}" if most == math.inf else f"an integer from {least} to {most}"

    def rule(value):
        value = plain(value)
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError(wanted)
        return int(value)

    return rule


def number(wanted, holds):
    """A real number of which `holds` is true; NaN and infinity are none."""

    def rule(value):
        value = plain(value)
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value) or not holds(value):
            raise ValueError(wanted)
        return int(value) if isinstance(value, numbers.Integral) else float(value)

    return rule


def at_least(least):
    return number(f"a number of at least {least}", lambda value: value >= least)


def optional(rule):
    """The rule, or None."""

    def either(value):
        try:
            return None if value is None else rule(value)
        except ValueError as error:
            raise ValueError(f"{error} or None") from None

    return either


def pair(name, rule):
    """Two values of a rule."""

    def both(values):
        if not isinstance(values, (list, tuple)) or len(values) != 2:
            raise ValueError("a pair")
        for i, value in enumerate(values):
            try:
                rule(value)
            except ValueError as error:
                raise ValueError(f"{error}, got {value!r}", f"{name}[{i}]") from None
        return tuple(map(rule, values))

    return both


def flag(value):
    if not isinstance(value, bool):
        raise ValueError("True or False")
    return value


def rate(value):
    """A 0-dim tensor stays one: a scheduler, or a captured step, writes into it."""
    if isinstance(value, torch.Tensor) and value.dim() == 0 and not value.is_complex() and value.dtype != torch.bool:
        return value
    return number("a number of at least 0 or a 0-dim tensor", lambda lr: lr >= 0)(value)


def rank(value):
    """None for a group without a subspace, which its optimizer may refuse."""
    try:
        return None if value is None else expect_rank(value, several=True)
    except ValueError:
        raise ValueError(wanted(value), "rank") from None


def scores(values):
    """A dict of names and numbers of at least 0, or its items, as a tuple of pairs."""
    wanted = "a dict of names and numbers of at least 0"
    try:
        pairs = tuple((name, number(wanted, lambda value: value >= 0)(value)) for name, value in dict(values).items())
    except TypeError:
        raise ValueError(wanted) from None
    if not all(isinstance(name, str) for name, _ in pairs):
        raise ValueError(wanted)
    return pairs


def places(values):
    """A tuple of places in a list."""
    try:
        return tuple(map(integer(0), values))
    except (TypeError, ValueError):
        raise ValueError("integers of at least 0") from None


share = number("a number in [0, 1]", lambda value: 0 <= value <= 1)
momentum = number("in [0, 1)", lambda value: 0 <= value < 1)

RULES = {
    "lr": rate,
    "betas": pair("betas", momentum),
    "eps": at_least(0),
    "weight_decay": at_least(0),
    "rank": rank,
    "update_proj_gap": integer(1),
    "refresh_every": integer(1),
    "seed": integer(-(2**62), 2**62),
    "min_8bit_size": integer(0),
    "scale": at_least(0),
    "alpha": at_least(0),
    "residual_scale": at_least(0),
    "quant": flag,
    "stochastic_rounding": flag,
    "int8_gemm": flag,
    "cos_threshold": optional(share),
    "gamma_proj": at_least(1),
    "queue_size": integer(1),
    "max_update_proj_gap": optional(integer(1)),
    "rho": share,
    "reproject_factor": integer(1),
    "passes": integer(1),
    "heads": integer(1),
    "compensation": integer(0),
    "gap_growth": at_least(1),
    "geodesic_step": at_least(0),
    "basis_rate": at_least(0),
    "orthogonality": at_least(0),
    "momentum": momentum,
    "nesterov": flag,
    "ns_steps": integer(1),
    "beta2": momentum,
    "active_layers": integer(1),
    "period": integer(1),
    "scores": optional(scores),
    "schedule_steps": integer(0),
    "settled": places,
    "tau": at_least(0),
    "grace": integer(0),
}


def check(group, rules):
    """Replace what `rules` know of a group by plain numbers; raises a ValueError with the key, its value and what is wanted."""
    for key, rule in rules.items():
        if key in group:
            try:
                group[key] = rule(group[key])
            except ValueError as error:
                want, *inner = error.args
                raise ValueError(f"{inner[0]} must be {want}" if inner else f"{key} must be {want}, got {group[key]!r}") from None
