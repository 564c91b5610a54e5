"""Ops that are compositions of other ops and torch.linalg: one implementation for all devices."""

import functools

import torch

from lowrank_sys import _ops
from lowrank_sys.reference.adafactor import adafactor_step
from lowrank_sys.reference.subspace import sketch_directions, subspace_iteration
from lowrank_sys.subspace.refresh import refresh_, refresh_from_sketch_


def _project(grad, basis, *, left):
    return torch.ops.lowrank.project(grad, basis, left=left)


def _back_project_(param, low_rank, basis, **arguments):
    torch.ops.lowrank.back_project_(param, low_rank, basis, **arguments)


IMPLEMENTATIONS = {
    "subspace_iteration": functools.partial(subspace_iteration, project=_project),
    "refresh_": refresh_,
    "sketch_directions": sketch_directions,
    "refresh_from_sketch_": refresh_from_sketch_,
    "adafactor_step": functools.partial(adafactor_step, project=_project, back_project_=_back_project_),
}


def register(library):
    for name, function in IMPLEMENTATIONS.items():
        library.impl(name, function, "CompositeExplicitAutograd")
