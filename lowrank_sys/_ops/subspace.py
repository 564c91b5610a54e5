"""Choosing and refreshing a basis."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lowrank_sys._ops.blockwise import INT4_NAMES, expect_codes
from lowrank_sys._ops.int4 import expect_int4
from lowrank_sys._ops.rules import (
    check_lists,
    define,
    expect,
    expect_basis,
    expect_dtype,
    expect_float,
    expect_like,
    expect_matrix,
    expect_number,
    expect_scalar,
    fake,
)

SUBSPACES = ("randomized", "svd")
MOMENTS = ("keep", "reset", "rotate")

# What the full forms of a refresh have besides: lists are empty where bases are dense, moments fp32, gaps fixed.
_FULL = (
    "Tensor(f!)[] basis_scales, Tensor(g!)[] basis_offsets, Tensor(h!)[] exp_avg_absmaxes, "
    "Tensor(i!)[] exp_avg_sq_absmaxes, Tensor(j!)[] gaps, Tensor(k!)[] overlaps, int group_size=256, "
    "float cos_threshold=0.4, float gamma_proj=2.0, int max_gap=0"
)

SCHEMAS = {
    "subspace_iteration": "(Tensor grad, Tensor? basis, *, SymInt rank, bool left, int n_iter=2, SymInt? oversample=None, "
    "int seed=0) -> (Tensor basis, Tensor energies)",
    # Advances the refresh schedule of many matrices by one step; countdowns are on the host.
    "refresh_": "(Tensor(a!)[] bases, Tensor[] grads, Tensor(b!)[] countdowns, Tensor(c!)[] exp_avgs, "
    "Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] steps, Tensor lr, *, bool left, int gap, int[] first_gaps, int[] seeds, "
    "str subspace, str moments) -> ()",
    "refresh_.full": "(Tensor(a!)[] bases, Tensor[] grads, Tensor(b!)[] countdowns, Tensor(c!)[] exp_avgs, "
    "Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] steps, Tensor lr, *, bool left, int gap, int[] first_gaps, int[] seeds, "
    f"str subspace, str moments, {_FULL}) -> ()",
    # Omega of the sketch Y = G Omega that is accumulated for the next basis.
    "sketch_directions": "(Tensor basis, Tensor? exp_avg, *, SymInt other, bool left, int seed=0) -> Tensor",
    # refresh_ from sketches, after the step: without elements for a matrix that is not due, or got no gradient.
    "refresh_from_sketch_": "(Tensor(a!)[] bases, Tensor[] sketches, Tensor(b!)[] countdowns, Tensor(c!)[] exp_avgs, "
    "Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] steps, Tensor lr, *, bool left, int gap, int[] first_gaps, int[] seeds, "
    "str moments) -> ()",
    "refresh_from_sketch_.full": "(Tensor(a!)[] bases, Tensor[] sketches, Tensor(b!)[] countdowns, Tensor(c!)[] exp_avgs, "
    "Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] steps, Tensor lr, *, bool left, int gap, int[] first_gaps, int[] seeds, "
    f"str moments, {_FULL}) -> ()",
}


class Stored(NamedTuple):
    """The lists that a refresh writes: bases, and the Adam state that `moments` acts on."""

    bases: Sequence
    scales: Sequence
    offsets: Sequence
    group_size: int
    exp_avgs: Sequence
    exp_avg_sqs: Sequence
    exp_avg_absmaxes: Sequence
    exp_avg_sq_absmaxes: Sequence
    steps: Sequence
    moments: str

    @property
    def is_int4(self):
        return len(self.scales) > 0

    def basis(self, i):
        """The tensors of basis i."""
        return (self.bases[i], self.scales[i], self.offsets[i]) if self.is_int4 else (self.bases[i],)

    def adam(self, i):
        """exp_avg, exp_avg_sq, the step and the absmaxes (or none) of matrix i."""
        absmaxes = (self.exp_avg_absmaxes[i], self.exp_avg_sq_absmaxes[i]) if self.exp_avg_absmaxes else ()
        return self.exp_avgs[i], self.exp_avg_sqs[i], self.steps[i], absmaxes


class Adaptive(NamedTuple):
    """The gaps of matrices that have their own, their queues of overlaps, and the rule (lowrank_sys.subspace.gap)."""

    gaps: Sequence
    overlaps: Sequence
    cos_threshold: float
    gamma_proj: float
    max_gap: int


def check_subspace_iteration(grad, basis, *, rank, left, n_iter, oversample, op="subspace_iteration"):
    expect_matrix(op, "grad", grad)
    m, n = grad.shape
    expect(rank >= 1, op, lambda: f"rank must be at least 1, got {rank}")
    expect(rank <= m and rank <= n, op, lambda: f"rank must be at most min(m, n) of grad ({m}, {n}), got {rank}")
    fewest = 0 if basis is None else 1
    expect(n_iter >= fewest, op, lambda: f"n_iter must be at least {fewest}, got {n_iter}")
    expect(oversample is None or oversample >= 0, op, lambda: f"oversample must be at least 0, got {oversample}")
    if basis is not None:
        expect_basis(op, grad, basis, left)
        expect(basis.shape[1] == rank, op, lambda: f"basis must have rank = {rank} columns, got {basis.shape[1]}")


def check_refresh(stored, grads, countdowns, lr, schedule, *, gap, first_gaps, seeds, subspace, op="refresh_"):
    check_lists(op, bases=stored.bases, grads=grads, countdowns=countdowns, first_gaps=first_gaps, seeds=seeds)
    expect(subspace in SUBSPACES, op, lambda: f"subspace must be one of {', '.join(SUBSPACES)}, got {subspace!r}")
    _check_stored(op, stored)
    check_schedule(op, countdowns, lr, gap, first_gaps, stored.moments)
    _check_adaptive(op, countdowns, schedule)


def check_refresh_from_sketch(
    stored, sketches, countdowns, lr, schedule, *, left, gap, first_gaps, seeds, op="refresh_from_sketch_"
):
    check_lists(op, bases=stored.bases, sketches=sketches, countdowns=countdowns, first_gaps=first_gaps, seeds=seeds)
    _check_stored(op, stored)
    check_schedule(op, countdowns, lr, gap, first_gaps, stored.moments)
    _check_adaptive(op, countdowns, schedule)
    for i, sketch in enumerate(sketches):
        if sketch.numel() > 0:
            _check_sketched_matrix(stored, i, sketch, left=left, op=op)


def _check_stored(op, stored):
    """The lengths of the lists that are not empty."""
    bases = {"bases": stored.bases}
    if stored.scales or stored.offsets:
        check_lists(op, **bases, basis_scales=stored.scales, basis_offsets=stored.offsets)
    if stored.moments != "keep":
        check_lists(op, **bases, exp_avgs=stored.exp_avgs, exp_avg_sqs=stored.exp_avg_sqs, steps=stored.steps)
        if stored.exp_avg_absmaxes or stored.exp_avg_sq_absmaxes:
            check_lists(op, **bases, exp_avg_absmaxes=stored.exp_avg_absmaxes, exp_avg_sq_absmaxes=stored.exp_avg_sq_absmaxes)


def _check_sketched_matrix(stored, i, sketch, *, left, op):
    expect_matrix(op, "sketch", sketch)
    expect_dtype(op, "sketch", sketch, torch.float32)
    basis, *parts = stored.basis(i)
    got, columns = sketch.shape if left else sketch.shape[::-1]
    if parts:
        expect_int4(op, basis, *parts, got, stored.group_size, basis.device, names=INT4_NAMES)
        d, rank = got, basis.shape[0]
    else:
        _check_own_basis(op, basis)
        d, rank = basis.shape
    expect(sketch.device == basis.device, op, lambda: f"sketch must be on {basis.device}, got {sketch.device}")
    expect(
        got == d and columns >= rank,
        op,
        lambda: (
            f"sketch must have shape {f'({d}, l)' if left else f'(l, {d})'} with "
            f"l >= rank = {rank} for left={left}, got {tuple(sketch.shape)}"
        ),
    )
    if stored.moments != "keep":
        exp_avg = stored.exp_avgs[i]
        expect(
            exp_avg.dim() == 2 and exp_avg.shape[0 if left else 1] == rank,
            op,
            lambda: f"exp_avg must have shape {f'({rank}, n)' if left else f'(m, {rank})'}, got {tuple(exp_avg.shape)}",
        )
        check_adam_state(op, exp_avg.shape, basis.device, *stored.adam(i))


def check_adam_state(op, shape, device, exp_avg, exp_avg_sq, step, absmaxes=()):
    for name, moment, absmax in zip(("exp_avg", "exp_avg_sq"), (exp_avg, exp_avg_sq), absmaxes or (None, None)):
        if absmax is not None:
            expect_codes(op, name, moment, f"{name}_absmax", absmax, shape, device)
        else:
            expect_like(op, name, moment, shape, device)
            expect_dtype(op, name, moment, torch.float32)
    expect_scalar(op, "step", step, device, own_device=True)
    expect_dtype(op, "step", step, torch.float32)


def _check_own_basis(op, basis):
    """A basis without the matrix that it projects."""
    expect_matrix(op, "basis", basis)
    d, rank = basis.shape
    expect(1 <= rank <= d, op, lambda: f"rank must be from 1 to the basis' {d} rows, got {rank}")


def check_sketch_directions(basis, exp_avg, *, other, left, op="sketch_directions"):
    _check_own_basis(op, basis)
    rank = basis.shape[1]
    expect(other >= rank, op, lambda: f"other must be at least rank = {rank}, got {other}")
    if exp_avg is not None:
        expect_float(op, "exp_avg", exp_avg)
        expect_like(op, "exp_avg", exp_avg, (rank, other) if left else (other, rank), basis.device)


def check_schedule(op, countdowns, lr, gap, first_gaps, moments):
    expect(gap >= 1, op, lambda: f"gap must be at least 1, got {gap}")
    expect(moments in MOMENTS, op, lambda: f"moments must be one of {', '.join(MOMENTS)}, got {moments!r}")
    expect(min(first_gaps, default=1) >= 1, op, lambda: f"first_gaps must be at least 1, got {min(first_gaps)}")
    check_on_host(op, "countdowns", countdowns)
    expect_number(op, "lr", lr, lr.device)


def _check_adaptive(op, countdowns, schedule):
    if schedule.gaps or schedule.overlaps:
        check_lists(op, countdowns=countdowns, gaps=schedule.gaps, overlaps=schedule.overlaps)
        check_on_host(op, "gaps", schedule.gaps)
        for i, queue in enumerate(schedule.overlaps):
            expect(
                queue.dim() == 1 and queue.dtype == torch.float32,
                op,
                lambda: f"overlaps[{i}] must be a vector of float32, got shape {tuple(queue.shape)}, {queue.dtype}",
            )


def check_on_host(op, name, counters):
    # Every step of every matrix comes by here: one comparison each, and a message only for a bad one.
    for i, c in enumerate(counters):
        fits = c.dtype is torch.int64 and c.dim() == 0 and c.is_cpu
        if not fits:
            expect(
                fits,
                op,
                lambda: f"{name}[{i}] must be a 0-dim int64 tensor on the CPU, got shape {tuple(c.shape)}, {c.dtype} on {c.device}",
            )


def check_refresh_matrix(stored, i, grad, *, left, op="refresh_"):
    """The rules of a matrix that is due."""
    basis, *parts = stored.basis(i)
    expect_matrix(op, "grad", grad)
    if parts:
        expect_int4(op, basis, *parts, grad.shape[0 if left else 1], stored.group_size, grad.device, names=INT4_NAMES)
        rank = basis.shape[0]
    else:
        expect_basis(op, grad, basis, left)
        rank = basis.shape[1]
    check_subspace_iteration(grad, None, rank=rank, left=left, n_iter=1, oversample=None, op=op)
    if stored.moments != "keep":
        shape = (rank, grad.shape[1]) if left else (grad.shape[0], rank)
        check_adam_state(op, shape, grad.device, *stored.adam(i))


define(SCHEMAS)


@fake("subspace_iteration")
def _(grad, basis, *, rank, left, n_iter=2, oversample=None, seed=0):
    check_subspace_iteration(grad, basis, rank=rank, left=left, n_iter=n_iter, oversample=oversample)
    return (grad.new_empty((grad.shape[0 if left else 1], rank), dtype=torch.float32), grad.new_empty((rank,), dtype=torch.float32))


def refresh_lists(
    bases,
    exp_avgs,
    exp_avg_sqs,
    steps,
    moments,
    basis_scales=(),
    basis_offsets=(),
    exp_avg_absmaxes=(),
    exp_avg_sq_absmaxes=(),
    group_size=256,
    gaps=(),
    overlaps=(),
    cos_threshold=0.4,
    gamma_proj=2.0,
    max_gap=0,
):
    """(Stored, Adaptive) of a refresh's arguments."""
    return (
        Stored(
            bases,
            basis_scales,
            basis_offsets,
            group_size,
            exp_avgs,
            exp_avg_sqs,
            exp_avg_absmaxes,
            exp_avg_sq_absmaxes,
            steps,
            moments,
        ),
        Adaptive(gaps, overlaps, cos_threshold, gamma_proj, max_gap),
    )


def _fake_refresh(
    bases, grads, countdowns, exp_avgs, exp_avg_sqs, steps, lr, *, left, gap, first_gaps, seeds, subspace, moments, **full
):
    stored, schedule = refresh_lists(bases, exp_avgs, exp_avg_sqs, steps, moments, **full)
    check_refresh(stored, grads, countdowns, lr, schedule, gap=gap, first_gaps=first_gaps, seeds=seeds, subspace=subspace)
    for i, grad in enumerate(grads):
        check_refresh_matrix(stored, i, grad, left=left)


fake("refresh_")(_fake_refresh)
fake("refresh_.full")(_fake_refresh)


@fake("sketch_directions")
def _(basis, exp_avg, *, other, left, seed=0):
    check_sketch_directions(basis, exp_avg, other=other, left=left)
    rank = basis.shape[1]
    return basis.new_empty((other, min(rank + max(8, -(-rank // 8)), basis.shape[0], other)))


def _fake_refresh_from_sketch(
    bases, sketches, countdowns, exp_avgs, exp_avg_sqs, steps, lr, *, left, gap, first_gaps, seeds, moments, **full
):
    stored, schedule = refresh_lists(bases, exp_avgs, exp_avg_sqs, steps, moments, **full)
    check_refresh_from_sketch(stored, sketches, countdowns, lr, schedule, left=left, gap=gap, first_gaps=first_gaps, seeds=seeds)


fake("refresh_from_sketch_")(_fake_refresh_from_sketch)
fake("refresh_from_sketch_.full")(_fake_refresh_from_sketch)
