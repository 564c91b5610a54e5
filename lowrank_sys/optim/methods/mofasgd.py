"""MoFaSGD (Mahdavinia and Mahdavi, TMLR 2025, arXiv:2507.08091): the momentum itself as a factorization of rank r."""

import torch

from lowrank_sys.optim.preset import Preset, method
from lowrank_sys.optim.remainder import WithoutBasis
from lowrank_sys.optim.rules import NoRule
from lowrank_sys.optim.update import Update
from lowrank_sys.optim.weight import panels
from lowrank_sys.subspace.factors import Factors


def products(g, s, left, right):
    """(leftᵀ G, G right) for G / s.size, fp32, in one read of it, without the rows that are not s.rows."""
    across, along = left.new_zeros(left.shape[1], g.shape[1]), right.new_empty(g.shape[0], right.shape[1])
    for first, end in panels(g.shape):
        rows = slice(first, end)
        part = torch.where(s.rows[rows], g[rows].float() / s.size, 0)
        across, along[rows] = across + left[rows].T @ part, part @ right
    return across, along


def truncated(middle, left, right, rank):
    """(U, S, V) of the `rank` leading singular triples of left middle rightᵀ, left and right (None: I) orthonormal."""
    u, values, vh = torch.linalg.svd(middle, full_matrices=False)
    return left @ u[:, :rank], values[:rank], vh[:rank].T if right is None else right @ vh[:rank].T


class FactoredMomentum(WithoutBasis):
    """M = U diag(S) Vᵀ <- the best of rank r of momentum M + (UUᵀG + G VVᵀ - UUᵀG VVᵀ); of the first gradient its own."""

    name, defaults = "factored-momentum", {"momentum": 0.95, "scale": 1.0, "residual_scale": 0.0}
    needs, reads_update = tuple(Factors.categories), False

    def measure(self, g, r, s, state, h):
        norms = torch.ops.lowrank.channel_norms(g, left=False).unsqueeze(1)
        s.rows = norms.isfinite()
        s.whole = 1 if s.grad_scale is None else s.grad_scale
        most = torch.maximum(torch.where(s.rows, norms, 0).amax(), state["values"].amax() / s.whole)
        s.size = torch.where(most > 0, most, 1)  # with which squares stay in fp32
        return s.rows

    def of(self, g, r, x, s, state, h):
        old = [state[name] for name in ("left_vectors", "values", "right_vectors")]
        size, rank = s.size * s.whole, len(old[1])
        u, values, v = old[0], old[1] / size, old[2]
        if int(state["started"]) == 0:
            u, _ = torch.ops.lowrank.subspace_iteration(g, None, rank=rank, left=True, n_iter=4, seed=state["seed"])
            new = truncated(products(g, s, u, v)[0], u, None, rank)
        else:
            across, along = products(g, s, u, v)
            (left, upper), (right, lower) = (torch.linalg.qr(torch.cat(pair, 1)) for pair in ((u, along), (v, across.T)))
            eye = torch.eye(rank, dtype=u.dtype, device=g.device)
            inner = torch.cat([torch.cat([h["momentum"] * values.diag() - across @ v, eye], 1), torch.cat([eye, 0 * eye], 1)])
            new = truncated(upper @ inner @ lower.T, left, right, rank)
        taken = s.ok.any()
        state["started"] += taken.device.type != "cpu" or bool(taken)
        for held, one, factor in zip(old, new, (1, size, 1)):
            held.copy_(torch.where(taken, one * factor, held))
        u, _, v = new
        normalised = h["scale"] * (new[1] > 0).to(u.dtype).unsqueeze(1) * v.T
        if h["residual_scale"] == 0:
            return Update(factors=(u, normalised))
        across, along = (h["residual_scale"] * size * product for product in products(g, s, u, v))
        inside = torch.cat([normalised - across + (across @ v) @ v.T, -v.T])
        outside = torch.full_like(s.step, h["residual_scale"])
        return Update(phi=g, scale=s.grad_scale, c=(outside,), factors=(torch.cat([u, along], 1), inside))


@method("mofasgd", lr=3e-2, plain_lr=3e-3, scale=1.0)
class MoFaSGD(Preset):
    """W <- (1 - lr*wd) W - lr [scale U Vᵀ + residual_scale (I - UUᵀ) G (I - VVᵀ)]: the momentum's singular values count as 1.

    Group keys: `rank`, `momentum` (0.95), `scale` (1), `residual_scale` (0), `seed`. Groups without `rank` are AdamW. The authors'
    code starts from the singular vectors of the weight, here from the first gradient's; it divides U Vᵀ by S once more.
    The singular vectors of a matrix (2r, 2r) at every step make the host wait for a GPU.
    State of a matrix: `left_vectors` (m, r), `values` (r,), `right_vectors` (n, r) fp32, and `started`, on the host.
    """

    rule, subspace, remainder = NoRule(), Factors(), FactoredMomentum()
