"""Choosing and refreshing a basis."""

import torch

from lowrank_sys._ops.projection import check_project
from lowrank_sys._ops.rules import (check_lists, define, expect, expect_basis, expect_dtype, expect_like, expect_matrix,
                                    fake)

SUBSPACES = ("randomized", "svd")
MOMENTS = ("keep", "reset", "rotate")

SCHEMAS = {
    "subspace_iteration": "(Tensor grad, Tensor? basis, *, SymInt rank, bool left, int n_iter=2, SymInt? oversample=None, "
    "int seed=0) -> (Tensor basis, Tensor energies)",
    # Advances the refresh schedule of many matrices by one step; countdowns are on the host.
    "refresh_": "(Tensor(a!)[] bases, Tensor[] grads, Tensor(b!)[] countdowns, Tensor(c!)[] exp_avgs, "
    "Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] steps, Tensor lr, *, bool left, int gap, int[] first_gaps, int[] seeds, "
    "str subspace, str moments) -> ()",
    # Omega of the sketch Y = G Omega that is accumulated for the next basis.
    "sketch_directions": "(Tensor basis, Tensor? exp_avg, *, SymInt other, bool left, int seed=0) -> Tensor",
    # refresh_ from sketches, after the step: None for a matrix that is not due, or got no gradient.
    "refresh_from_sketch_": "(Tensor(a!)[] bases, Tensor?[] sketches, Tensor(b!)[] countdowns, Tensor(c!)[] exp_avgs, "
    "Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] steps, Tensor lr, *, bool left, int gap, int[] first_gaps, int[] seeds, "
    "str moments) -> ()",
}


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


def check_refresh(bases, grads, countdowns, exp_avgs, exp_avg_sqs, steps, *, gap, first_gaps, seeds, subspace, moments,
                  op="refresh_"):
    check_lists(op, bases=bases, grads=grads, countdowns=countdowns, first_gaps=first_gaps, seeds=seeds)
    if moments != "keep":
        check_lists(op, bases=bases, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, steps=steps)
    expect(subspace in SUBSPACES, op, lambda: f"subspace must be one of {', '.join(SUBSPACES)}, got {subspace!r}")
    _check_schedule(op, countdowns, gap, first_gaps, moments)


def check_refresh_from_sketch(bases, sketches, countdowns, exp_avgs, exp_avg_sqs, steps, *, left, gap, first_gaps, seeds,
                              moments, op="refresh_from_sketch_"):
    check_lists(op, bases=bases, sketches=sketches, countdowns=countdowns, first_gaps=first_gaps, seeds=seeds)
    if moments != "keep":
        check_lists(op, bases=bases, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, steps=steps)
    _check_schedule(op, countdowns, gap, first_gaps, moments)
    for i, (basis, sketch) in enumerate(zip(bases, sketches)):
        if sketch is not None:
            expect_matrix(op, f"bases[{i}]", basis)
            d, rank = basis.shape
            expect_dtype(op, f"sketches[{i}]", sketch, torch.float32)
            fits = sketch.dim() == 2 and sketch.shape[0 if left else 1] == d and sketch.shape[1 if left else 0] >= rank
            expect(fits, op, lambda: f"sketches[{i}] must have shape {f'({d}, l)' if left else f'(l, {d})'} with l >= {rank} "
                   f"for left={left}, got {tuple(sketch.shape)}")


def check_sketch_directions(basis, exp_avg, *, other, left, op="sketch_directions"):
    expect_matrix(op, "basis", basis)
    rank = basis.shape[1]
    expect(1 <= rank <= basis.shape[0] and rank <= other, op,
           lambda: f"rank must be between 1 and min(m, n) = {min(basis.shape[0], other)}, got {rank}")
    if exp_avg is not None:
        expect_like(op, "exp_avg", exp_avg, (rank, other) if left else (other, rank), basis.device)


def _check_schedule(op, countdowns, gap, first_gaps, moments):
    expect(gap >= 1, op, lambda: f"gap must be at least 1, got {gap}")
    expect(moments in MOMENTS, op, lambda: f"moments must be one of {', '.join(MOMENTS)}, got {moments!r}")
    expect(min(first_gaps, default=1) >= 1, op, lambda: f"first_gaps must be at least 1, got {min(first_gaps)}")
    # Every step of every matrix comes by here: one comparison each, and a message only for a bad one.
    for i, c in enumerate(countdowns):
        fits = c.dtype == torch.int64 and c.dim() == 0 and c.device.type == "cpu"
        if not fits:
            expect(fits, op, lambda: f"countdowns[{i}] must be a 0-dim int64 tensor on the CPU, got shape {tuple(c.shape)}, "
                    f"{c.dtype} on {c.device}")


define(SCHEMAS)


@fake("subspace_iteration")
def _(grad, basis, *, rank, left, n_iter=2, oversample=None, seed=0):
    check_subspace_iteration(grad, basis, rank=rank, left=left, n_iter=n_iter, oversample=oversample)
    return (grad.new_empty((grad.shape[0 if left else 1], rank), dtype=torch.float32),
            grad.new_empty((rank,), dtype=torch.float32))


@fake("refresh_")
def _(bases, grads, countdowns, exp_avgs, exp_avg_sqs, steps, lr, *, left, **arguments):
    check_refresh(bases, grads, countdowns, exp_avgs, exp_avg_sqs, steps, **arguments)
    for basis, grad in zip(bases, grads):
        check_project(grad, basis, left=left, op="refresh_")


@fake("sketch_directions")
def _(basis, exp_avg, *, other, left, seed=0):
    check_sketch_directions(basis, exp_avg, other=other, left=left)
    rank = basis.shape[1]
    return basis.new_empty((other, min(rank + max(8, -(-rank // 8)), basis.shape[0], other)))


@fake("refresh_from_sketch_")
def _(bases, sketches, countdowns, exp_avgs, exp_avg_sqs, steps, lr, **arguments):
    check_refresh_from_sketch(bases, sketches, countdowns, exp_avgs, exp_avg_sqs, steps, **arguments)
