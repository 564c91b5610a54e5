"""SCALE (Glentis et al. 2025, arXiv:2506.16659): gradients of unit RMS by output, and momentum for the output head alone."""

import math

import torch
from torch import nn

from lowrank_sys.optim.groups import param_groups
from lowrank_sys.optim.preset import Preset, method
from lowrank_sys.optim.remainder import WithoutBasis
from lowrank_sys.optim.rules import Adam, Momentum
from lowrank_sys.optim.update import Update
from lowrank_sys.subspace.none import NoSubspace


class UnitRms(WithoutBasis):
    """X / max(rms(X), 1e-8), the mean over each row, or with the group key `over` 'columns' over each column."""

    name, defaults, sharded = "unit-rms", {"over": "rows"}, True

    def check(self, group):
        if group["over"] not in ("rows", "columns"):
            raise ValueError(f"over must be one of rows, columns, got {group['over']!r}")

    def sums(self, h):
        return h["over"] == "columns"

    def _rms(self, x, s, h):
        columns = h["over"] == "columns"
        norms = torch.ops.lowrank.channel_norms(x, left=columns)
        norms, count = (s.shard.norms(norms), s.shard.rows or x.shape[0]) if columns else (norms, x.shape[1])
        return (norms / math.sqrt(max(1, count))).unsqueeze(0 if columns else 1)

    def measure(self, g, r, s, state, h):
        s.rms = self._rms(g, s, h)
        return s.rms.isfinite()

    def of(self, g, r, x, s, state, h):
        rms, scale = (s.rms, s.grad_scale) if x is g else (self._rms(x, s, h), None)
        return Update(phi=x, scale=scale, c=(1 / (rms if scale is None else rms * scale).clamp(min=1e-8),))


class MatrixMomentum(Momentum):
    """Momentum of matrices; AdamW of all else."""

    sharded = True
    defaults = {"momentum": 0.0, "betas": (0.9, 0.999), "eps": 1e-8}
    plain = Adam()


def groups(model, rank=None, *, plain=None, **keys):
    """[AdamW's vectors, matrices, the embeddings, the head with momentum 0.9] of a model, as its authors have them."""
    if rank is not None:
        raise ValueError(f"rank must be None for SCALE, which has no subspace, got {rank!r}")
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    vectors, matrices = param_groups(model, rank=None, plain=plain, **keys)
    own = {key: value for key, value in matrices.items() if key != "params"}
    sorts = {"vectors": [], "embeddings": [], "head": []}
    for name, p in vectors["params"]:
        head = output is not None and p is output.weight
        sorts["head" if head else "embeddings" if id(p) in embedded else "vectors"].append((name, p))
    head, embeddings = {**own, "params": sorts["head"], "momentum": 0.9}, {**own, "params": sorts["embeddings"], "over": "columns"}
    return [{**vectors, "params": sorts["vectors"]}, matrices, *(group for group in (embeddings, head) if group["params"])]


@method("scale", lr=5e-4, plain_lr=3e-3, rank=None, groups=groups)
class SCALE(Preset):
    """W <- (1 - lr*wd) W - lr U, each row of U the gradient's at an RMS of 1. Groups with `rank` None; others are AdamW.

    Group keys: `momentum` (0; 0.9 for the head: M <- momentum M + (1 - momentum) G in G's place), `over` (rows | columns; for an
    embedding the mean runs over the vocabulary). lowrank_sys.optim.methods.scale.groups(model) makes them. No state but the head's.
    """

    rule, subspace, remainder = MatrixMomentum(), NoSubspace(), UnitRms()
