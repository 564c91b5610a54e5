"""Choosing a basis."""

import torch

from lowrank_sys._ops.rules import define, expect, expect_basis, expect_float, expect_like, expect_matrix, fake

SCHEMAS = {
    "subspace_iteration": "(Tensor grad, Tensor? basis, *, SymInt rank, bool left, int n_iter=2, SymInt? oversample=None, "
    "int seed=0) -> (Tensor basis, Tensor energies)",
    # Omega of the sketch Y = G Omega that is accumulated for the next basis.
    "sketch_directions": "(Tensor basis, Tensor? exp_avg, *, SymInt other, bool left, int seed=0) -> Tensor",
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


define(SCHEMAS)


@fake("subspace_iteration")
def _(grad, basis, *, rank, left, n_iter=2, oversample=None, seed=0):
    check_subspace_iteration(grad, basis, rank=rank, left=left, n_iter=n_iter, oversample=oversample)
    return (grad.new_empty((grad.shape[0 if left else 1], rank), dtype=torch.float32), grad.new_empty((rank,), dtype=torch.float32))


@fake("sketch_directions")
def _(basis, exp_avg, *, other, left, seed=0):
    check_sketch_directions(basis, exp_avg, other=other, left=left)
    rank = basis.shape[1]
    return basis.new_empty((other, min(rank + max(8, -(-rank // 8)), basis.shape[0], other)))
