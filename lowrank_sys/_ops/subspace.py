"""Choosing and refreshing a basis."""

import torch

from lowrank_sys._ops.projection import check_project
from lowrank_sys._ops.rules import (check_lists, define, expect, expect_basis, expect_dtype, expect_float, expect_like,
                                    expect_matrix, expect_number, expect_scalar, fake, low_rank_shape)

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
    # refresh_ from sketches, after the step: without elements for a matrix that is not due, or got no gradient.
    "refresh_from_sketch_": "(Tensor(a!)[] bases, Tensor[] sketches, Tensor(b!)[] countdowns, Tensor(c!)[] exp_avgs, "
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


def check_refresh(bases, grads, countdowns, exp_avgs, exp_avg_sqs, steps, lr, *, gap, first_gaps, seeds, subspace, moments,
                  op="refresh_"):
    check_lists(op, bases=bases, grads=grads, countdowns=countdowns, first_gaps=first_gaps, seeds=seeds)
    if moments != "keep":
        check_lists(op, bases=bases, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, steps=steps)
    expect(subspace in SUBSPACES, op, lambda: f"subspace must be one of {', '.join(SUBSPACES)}, got {subspace!r}")
    check_schedule(op, countdowns, lr, gap, first_gaps, moments)


def check_refresh_from_sketch(bases, sketches, countdowns, exp_avgs, exp_avg_sqs, steps, lr, *, left, gap, first_gaps, seeds,
                              moments, op="refresh_from_sketch_"):
    check_lists(op, bases=bases, sketches=sketches, countdowns=countdowns, first_gaps=first_gaps, seeds=seeds)
    if moments != "keep":
        check_lists(op, bases=bases, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, steps=steps)
    check_schedule(op, countdowns, lr, gap, first_gaps, moments)
    for i, sketch in enumerate(sketches):
        if sketch.numel() > 0:
            state = (None,) * 3 if moments == "keep" else (exp_avgs[i], exp_avg_sqs[i], steps[i])
            _check_sketched_matrix(bases[i], sketch, *state, left=left, op=op)


def _check_sketched_matrix(basis, sketch, exp_avg, exp_avg_sq, step, *, left, op):
    _check_own_basis(op, basis)
    d, rank = basis.shape
    expect_matrix(op, "sketch", sketch)
    expect_dtype(op, "sketch", sketch, torch.float32)
    expect(sketch.device == basis.device, op, lambda: f"sketch must be on {basis.device}, got {sketch.device}")
    got, columns = sketch.shape if left else sketch.shape[::-1]
    expect(got == d and columns >= rank, op, lambda: f"sketch must have shape {f'({d}, l)' if left else f'(l, {d})'} with "
           f"l >= rank = {rank} for left={left}, got {tuple(sketch.shape)}")
    if step is not None:
        expect(exp_avg.dim() == 2 and exp_avg.shape[0 if left else 1] == rank, op,
               lambda: f"exp_avg must have shape {f'({rank}, n)' if left else f'(m, {rank})'}, got {tuple(exp_avg.shape)}")
        check_adam_state(op, exp_avg.shape, basis.device, exp_avg, exp_avg_sq, step)


def check_adam_state(op, shape, device, exp_avg, exp_avg_sq, step):
    for name, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
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


def check_on_host(op, name, counters):
    # Every step of every matrix comes by here: one comparison each, and a message only for a bad one.
    for i, c in enumerate(counters):
        fits = c.dtype == torch.int64 and c.dim() == 0 and c.device.type == "cpu"
        if not fits:
            expect(fits, op, lambda: f"{name}[{i}] must be a 0-dim int64 tensor on the CPU, got shape {tuple(c.shape)}, "
                    f"{c.dtype} on {c.device}")


def check_refresh_matrix(basis, grad, exp_avg, exp_avg_sq, step, *, left, op="refresh_"):
    """The rules of a matrix that is due; the Adam state is None where the moments are kept."""
    check_project(grad, basis, left=left, op=op)
    check_subspace_iteration(grad, basis, rank=basis.shape[1], left=left, n_iter=1, oversample=None, op=op)
    if step is not None:
        check_adam_state(op, low_rank_shape(grad, basis, left), grad.device, exp_avg, exp_avg_sq, step)


def refresh_matrix(i, bases, grads, exp_avgs, exp_avg_sqs, steps, moments):
    """Arguments of `check_refresh_matrix` for matrix i."""
    return bases[i], grads[i], *((None,) * 3 if moments == "keep" else (exp_avgs[i], exp_avg_sqs[i], steps[i]))


define(SCHEMAS)


@fake("subspace_iteration")
def _(grad, basis, *, rank, left, n_iter=2, oversample=None, seed=0):
    check_subspace_iteration(grad, basis, rank=rank, left=left, n_iter=n_iter, oversample=oversample)
    return (grad.new_empty((grad.shape[0 if left else 1], rank), dtype=torch.float32),
            grad.new_empty((rank,), dtype=torch.float32))


@fake("refresh_")
def _(bases, grads, countdowns, exp_avgs, exp_avg_sqs, steps, lr, *, left, **arguments):
    check_refresh(bases, grads, countdowns, exp_avgs, exp_avg_sqs, steps, lr, **arguments)
    for i in range(len(bases)):
        matrix = refresh_matrix(i, bases, grads, exp_avgs, exp_avg_sqs, steps, arguments["moments"])
        check_refresh_matrix(*matrix, left=left)


@fake("sketch_directions")
def _(basis, exp_avg, *, other, left, seed=0):
    check_sketch_directions(basis, exp_avg, other=other, left=left)
    rank = basis.shape[1]
    return basis.new_empty((other, min(rank + max(8, -(-rank // 8)), basis.shape[0], other)))


@fake("refresh_from_sketch_")
def _(bases, sketches, countdowns, exp_avgs, exp_avg_sqs, steps, lr, **arguments):
    check_refresh_from_sketch(bases, sketches, countdowns, exp_avgs, exp_avg_sqs, steps, lr, **arguments)
