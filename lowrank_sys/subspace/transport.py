"""What becomes of the moments when their basis changes. `TRANSPORTS` is open: a method adds its own by name."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from lowrank_sys import _ops


def rotation(old, new, dtype):
    """C = newᵀ old (r, r), exactly I where the two are equal: a basis that was kept leaves its moments as they are."""
    c = new.to(dtype).T @ old.to(dtype)
    same = (new.to(dtype) == old.to(dtype)).all()
    return torch.where(same, torch.eye(c.shape[0], dtype=dtype, device=c.device), c)


def rotated(moment, c, *, left):
    """C M, or M Cᵀ for a basis on the right."""
    return c @ moment if left else moment @ c.T


def rotate_moments_(exp_avg, exp_avg_sq, old, new, *, left):
    """Carry Adam's moments into a new basis, in place: M <- C M and V <- (C∘C) V with C = newᵀ old (right: times Cᵀ).

    V is then the variance of C R for a low-rank gradient R of uncorrelated entries, a sum of products that are not negative:
    no rounding makes it negative.

    exp_avg, exp_avg_sq: (r, n) if left, else (m, r), fp32. old, new: (m or n, r), fp32 | bf16 | fp16, orthonormal columns.
    """
    _ops.transport.check_rotate_moments(exp_avg, exp_avg_sq, old, new, left=left)
    c = rotation(old, new, exp_avg.dtype)
    exp_avg.copy_(rotated(exp_avg, c, left=left))
    exp_avg_sq.copy_(rotated(exp_avg_sq, c * c, left=left))


class Transport(NamedTuple):
    """carry(due, old, new, kept) takes the matrix (lowrank_sys.subspace.refresh.Due), its bases (d, r) before and after as they are
    stored, None without `bases`, and whether they are equal (0-dim bool, for which nothing waits). needs: names of the state that
    it reads beside all moments of R's shape. sharded: whether it sums over no channels, so that shards of rows serve it."""

    carry: Callable
    bases: bool = True
    needs: tuple = ()
    sharded: bool = False


def keep(due, old, new, kept):
    """Moments stay as they are, and mean other directions."""


def reset(due, old, new, kept, step=True):
    """Moments are forgotten, and with them, unless others still count it, the step that corrects their bias."""
    due.forget(step)


def rotate(due, old, new, kept, first=False):
    """M <- C M, and (C∘C) V of a moment that has no sign; where `first` such a one stays."""
    c = rotation(old, new, torch.float32)
    for name, signed in due.moments.items():
        if signed or not first:
            due.write(name, rotated(due.moment(name), c if signed else c * c, left=due.left), kept)


def match(due, old, new, kept):
    """Moments of a direction that stays move to where it is now, and others begin at zero. old, new: indices (r,), ascending."""
    place = torch.searchsorted(old, new).clamp(max=len(old) - 1)
    stays, axis = old[place] == new, 0 if due.left else 1
    for name in due.moments:
        moment = due.moment(name).index_select(axis, place)
        due.write(name, torch.where(stays.unsqueeze(1 - axis), moment, 0), kept)


def corrected(due):
    """(M / (1 - beta1^t), V / (1 - beta2^t), 1 - beta2^t) as rows of R stand for left bases; t counts the steps that were taken."""
    m, v = (due.moment(name).T if not due.left else due.moment(name) for name in ("exp_avg", "exp_avg_sq"))
    first, second = (1 - due.h[f"beta{i}"] ** due.state["step"].clamp(min=1) for i in (1, 2))
    return m / first, v / second, second


def follow(due, old, new, kept):
    """M <- C M, and of V the variance that C∘C carries over around the moved mean (Robert et al. 2024); (M before, M after)."""
    c, (m, v, second) = rotation(old, new, torch.float32), corrected(due)
    moved = c @ m
    before, after = due.moment("exp_avg").clone(), rotated(due.moment("exp_avg"), c, left=due.left)
    spread = (second * ((c * c) @ (v - m.square()) + moved.square())).abs()
    variance = torch.where(kept, due.moment("exp_avg_sq"), spread if due.left else spread.T)
    due.write("exp_avg", after, kept)
    due.write("exp_avg_sq", variance, kept)
    return before, after


TRANSPORTS = {
    "keep": Transport(keep, bases=False, sharded=True),
    "reset": Transport(reset, bases=False, sharded=True),
    "rotate": Transport(rotate, sharded=True),
    "clear": Transport(functools.partial(reset, step=False), bases=False, sharded=True),
    "rotate-first": Transport(functools.partial(rotate, first=True), sharded=True),
    "follow": Transport(follow, needs=("exp_avg", "exp_avg_sq"), sharded=True),
    "match": Transport(match, needs=("columns",), sharded=True),
}
