"""Ops that are compositions of other ops and torch.linalg: one implementation for all devices."""

import functools

import torch

from lowrank_sys import _ops
from lowrank_sys._ops.rules import implement
from lowrank_sys.subspace import columns, keys, none, orthonormal, rows  # noqa: F401  the kinds that a refresh may name
from lowrank_sys.subspace.dct import dct_columns, dct_select
from lowrank_sys.subspace.iteration import project, sketch_directions, subspace_iteration
from lowrank_sys.subspace.orthogonalize import newton_schulz
from lowrank_sys.subspace.refresh import refresh_
from lowrank_sys.subspace.transport import rotate_moments_


def row_norms(grad, *, left):
    """2-norm of every row that can be selected: (m,), of the rows of G (m, n), if left, else (n,), of its columns; fp32.

    The channel norms of the other side, by the same kernels.
    """
    _ops.sparse.check_row_norms(grad)
    return torch.ops.lowrank.channel_norms(grad, left=not left)


IMPLEMENTATIONS = {
    "row_norms": row_norms,
    "subspace_iteration": functools.partial(subspace_iteration, project=project),
    "sketch_directions": sketch_directions,
    "refresh_": refresh_,
    "rotate_moments_": rotate_moments_,
    "dct_select": dct_select,
    "dct_columns": dct_columns,
    "newton_schulz": newton_schulz,
}


def register():
    for name, function in IMPLEMENTATIONS.items():
        implement(name, function, "CompositeExplicitAutograd")
