"""Ops that are compositions of other ops and torch.linalg: one implementation for all devices."""

import functools

import torch

from lowrank_sys._ops.rules import implement
from lowrank_sys.reference.adafactor import adafactor_step
from lowrank_sys.reference.dct import dct_columns, dct_select
from lowrank_sys.reference.orthogonalize import newton_schulz
from lowrank_sys.reference.sparse import row_norms
from lowrank_sys.reference.subspace import sketch_directions, subspace_iteration
from lowrank_sys.reference.transport import rotate_moments_
from lowrank_sys.subspace.refresh import refresh_, refresh_from_sketch_
from lowrank_sys.subspace.schedule import refresh_keys_, refresh_rows_


def _project(grad, basis, *, left):
    return torch.ops.lowrank.project(grad, basis, left=left)


def _back_project_(param, low_rank, basis, **arguments):
    torch.ops.lowrank.back_project_(param, low_rank, basis, **arguments)


def _channel_norms(grad, *, left):
    return torch.ops.lowrank.channel_norms(grad, left=left)


def _select_rows(norms, *, r, method):
    return torch.ops.lowrank.select_rows(norms, r=r, method=method)


IMPLEMENTATIONS = {
    "row_norms": functools.partial(row_norms, norms=_channel_norms),
    "subspace_iteration": functools.partial(subspace_iteration, project=_project),
    "refresh_": refresh_,
    "refresh_.full": refresh_,
    "sketch_directions": sketch_directions,
    "refresh_from_sketch_": refresh_from_sketch_,
    "refresh_from_sketch_.full": refresh_from_sketch_,
    "refresh_keys_": refresh_keys_,
    "refresh_rows_": refresh_rows_,
    "rotate_moments_": rotate_moments_,
    "dct_select": functools.partial(dct_select, select=_select_rows),
    "dct_columns": dct_columns,
    "newton_schulz": newton_schulz,
    "adafactor_step": functools.partial(adafactor_step, project=_project, back_project_=_back_project_),
}


def register():
    for name, function in IMPLEMENTATIONS.items():
        implement(name, function, "CompositeExplicitAutograd")
