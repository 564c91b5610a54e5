"""The rank of a matrix: a number, a share of its shorter side, or what a rule says of it."""

import numbers
from collections.abc import Callable

import torch

from lowrank_sys.subspace.matrices import expect_matrices, matrix_shape

# rule(name, weight) -> the rank of a weight (m, n), or of each matrix of a weight (E, m, n); a parameter of this name in the model.
Rule = Callable[[str, torch.Tensor], int]
Rank = int | float | Rule


def is_whole(value):
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= 1


def wanted(value):
    """What rank must be, where it is `value`."""
    return f"an integer of at least 1, got {value!r} (or a share of the shorter side, in (0, 1), or a function of (name, weight))"


def expect_rank(value, several=False):
    """A Rank as a plain number or the function that it is; ValueError for what is none. several: a list of integers is one too."""
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if several and isinstance(value, (list, tuple)) and all(map(is_whole, value)):
        return tuple(map(int, value))
    if is_whole(value):
        return int(value)
    if callable(value) or isinstance(value, numbers.Real) and 0 < value < 1:
        return value
    raise ValueError(f"rank must be {wanted(value)}")


def rank_of(rank, name, weight):
    """The rank of one weight as a Rank says; ValueError for a rule that gives none."""
    short = min(matrix_shape(weight.shape))
    if not callable(rank):
        return rank if is_whole(rank) else max(1, round(rank * short))
    own = rank(name, weight)
    if not is_whole(own) or own > short:
        raise ValueError(f"rank must give an integer from 1 to {short} for {name} of shape {tuple(weight.shape)}, got {own!r}")
    return int(own)


def resolved(rank, names, params):
    """The rank of a group of these parameters: an integer if all have the same, else one for each of them; None as it is."""
    if rank is None or is_whole(rank):
        return rank
    if not isinstance(rank, tuple):
        for name, param in zip(names, params):
            expect_matrices(name, param)
        rank = tuple(rank_of(rank, name, param) for name, param in zip(names, params))
    if len(rank) != len(params):
        raise ValueError(f"rank must have an integer for each of {len(params)} parameters, got {len(rank)}")
    return rank[0] if len(set(rank)) == 1 else rank


def of_parameter(group, i):
    """The group as parameter i has it, whose rank is one integer."""
    return {**group, "rank": group["rank"][i]} if isinstance(group["rank"], (list, tuple)) else group
