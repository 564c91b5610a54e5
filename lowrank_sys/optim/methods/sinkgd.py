"""SinkGD (Scetbon et al., NeurIPS 2025, arXiv:2502.06742): rows and columns of the gradient brought to one norm by turns."""

import math

import torch

from lowrank_sys.optim.preset import Preset, method
from lowrank_sys.optim.remainder import WithoutBasis
from lowrank_sys.optim.rules import NoRule
from lowrank_sys.optim.update import Update
from lowrank_sys.optim.weight import panels
from lowrank_sys.subspace.none import NoSubspace


def _factor(squares, size):
    """What brings vectors of these squared norms to sqrt(size); 0 for a zero one."""
    return torch.where(squares > 0, math.sqrt(size) * squares.rsqrt(), 0)


class Sinkhorn(WithoutBasis):
    """X = diag(a) G diag(b) after `passes` (5) times of rows to norm sqrt(n), columns to norm sqrt(m). It keeps a and b alone."""

    name, defaults, sharded, reads_update = "sinkhorn", {"passes": 5}, True, False

    def sums(self, h):
        return True

    def measure(self, g, r, s, state, h):
        norms = torch.ops.lowrank.channel_norms(g, left=False).unsqueeze(1)
        s.rows = norms.isfinite()
        s.unit = torch.where(s.rows, 1 / norms.clamp(min=1e-38), 0)  # rows first come to norm 1, of which no square leaves fp32
        return s.rows

    def of(self, g, r, x, s, state, h):
        m, n = g.shape
        a, b = s.rows.float(), g.new_ones((1, n), dtype=torch.float32)
        for _ in range(h["passes"]):
            total = torch.zeros_like(b)
            for first, end in panels(g.shape):
                rows = slice(first, end)
                part = torch.where(s.rows[rows], g[rows].float() * s.unit[rows], 0)
                a[rows] = _factor((part * b).square_().sum(1, keepdim=True), n)
                total += (part * a[rows]).square_().sum(0, keepdim=True)
            b = _factor(s.shard.sum(total), s.shard.rows or m)
        return Update(phi=g, c=(s.unit, a, b))


@method("sinkgd", lr=5e-4, plain_lr=3e-3, rank=None)
class SinkGD(Preset):
    """W <- (1 - lr*wd) W - lr X, without a state. Groups with `rank` None; others (embeddings, head, vectors) are AdamW.

    Group key: `passes` (5). A row that is not finite stays as it is, and counts for no column.
    """

    rule, subspace, remainder = NoRule(), NoSubspace(), Sinkhorn()
