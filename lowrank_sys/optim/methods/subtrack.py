"""SubTrack++ (Rajabi et al. 2025, arXiv:2502.01586): a basis that moves along a geodesic towards what it leaves of the gradient."""

import torch

from lowrank_sys.optim.preset import Preset, method
from lowrank_sys.optim.remainder import ScaledResidual
from lowrank_sys.optim.rules import RatioAdam
from lowrank_sys.subspace.iteration import cholesky_qr, leading_eigenvectors, svd_basis
from lowrank_sys.subspace.select import SELECT, Selector


class Geodesic(Selector):
    """S <- S + [S v (cos a - 1) + u sin a] vᵀ, a = `geodesic_step` sigma.

    (u, sigma, v) is the leading triple of 2 (G - S Sᵀ G)(Sᵀ G)ᵀ: a step down |S Sᵀ G - G|² on the Grassmannian, of rank one. A
    first basis is the SVD's; one in 16 bits is made orthonormal again before each step. On the right the same with Gᵀ.
    """

    hyper, sized, staggered, sharded = {"geodesic_step": 10.0}, True, False, True

    def choose(self, due):
        if due.old is None:
            return svd_basis(due.gradient, None, rank=due.rank, left=due.left, shard=due.shard)
        g = due.gradient.float() if due.left else due.gradient.float().T  # (d, channels)
        total = due.shard.sum  # over channels
        size = due.shard.norms(torch.linalg.vector_norm(g))
        valid = size.isfinite() & (size > 0)
        g, old = torch.where(valid, g, 0), due.old.float()
        s = cholesky_qr(old, passes=1, shifts=(0.0,))
        r = s.T @ g
        tangent = 2 * (total(g @ r.T) - s @ total(r @ r.T))
        v = leading_eigenvectors(tangent.T @ tangent, 1)
        u = tangent @ v
        sigma = torch.linalg.vector_norm(u)
        angle = due.h["geodesic_step"] * sigma
        turned = s @ v * (angle.cos() - 1) + u / sigma.clamp(min=torch.finfo(u.dtype).tiny) * angle.sin()
        new = s + turned @ v.T
        valid = valid & new.isfinite().all()
        return torch.where(valid, new, old), torch.where(valid, total(r.square().sum(1)), 0)


SELECT["subtrack"] = Geodesic()


@method("subtrack", lr=1e-2, plain_lr=3e-3, scale_key="alpha", subspace="subtrack")
class SubTrackAdamW(Preset):
    """W <- (1 - lr*wd) W - a [alpha back(N) + s o (G - back(R))], N, a, s and the limiter as FiraAdamW, on a tracked basis.

    Moments follow the basis as LDAdam's: M <- C M, V the variance around it. Group keys: `rank`, `update_proj_gap` (200),
    `geodesic_step` (10, times the gradient's own size), `alpha` (0.25), `proj_type`, and the other keys of GaLoreAdamW but `scale`.
    State of a matrix: that of GaLoreAdamW, and `limiter`. In the authors' code right bases never move.
    """

    rule, remainder = RatioAdam(), ScaledResidual(exact=True)
    low_rank_defaults = {"subspace": "subtrack", "moments": "follow"}
