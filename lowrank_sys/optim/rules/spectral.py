"""Rules that look at a whole matrix: Newton-Schulz on its momentum (Muon), a preconditioner on its short side (ASGO)."""

import math

import torch

from lowrank_sys.optim.moments import SHORT, Moment
from lowrank_sys.optim.rules.adam import Adam
from lowrank_sys.optim.rules.rule import Rule
from lowrank_sys.subspace.orthogonalize import iterate

# RMS of an update, about that of AdamW's, so that its rates serve (Liu et al. 2025, arXiv:2502.16982, section 2.2).
RMS = 0.2
# Odd polynomials a x + b x³ + c x⁵ that bring x from 1e-3 ... 1 to 1 faster than any others (Amsel et al. 2025, arXiv:2505.16932);
# the last one serves all further steps. All but that one at x / 1.01: rounding must not lift x above 1.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
SAFETY = 1.01
ROOT_STEPS = 10


class Spectral(Rule):
    """Base: everything but matrices has AdamW."""

    @property
    def plain(self):
        return Adam()


class Muon(Spectral):
    """X = 0.2 sqrt(max(rows, columns)) NS(momentum M + (1 - momentum) R), M <- momentum M + (1 - momentum) R.

    `nesterov` False: NS(M). NS: `ns_steps` iterations of lowrank_sys.subspace.orthogonalize.newton_schulz.
    """

    name, defaults, sharded = "muon", {"momentum": 0.95, "nesterov": True, "ns_steps": 5}, True
    state = {"exp_avg": Moment(signed=True)}

    def update(self, r, s, h):
        s.exp_avg.lerp_(r, 1 - h["momentum"])
        x = r.lerp(s.exp_avg, h["momentum"]) if h["nesterov"] else s.exp_avg
        if s.shard.group:
            x = iterate(x, steps=h["ns_steps"], shard=s.shard)
        else:
            x = torch.ops.lowrank.newton_schulz(x, steps=h["ns_steps"])
        return RMS * math.sqrt(max(s.shard.rows or r.shape[0], r.shape[1])) * x


def inverse_root(v):
    """V^(-1/2) up to a factor, of a positive semidefinite V (k, k) fp32: by products alone, so that no GPU makes the host wait.

    Y -> V^(1/2) and Z -> V^(-1/2) by Y <- Y P, Z <- P Z, P = a I + b Z Y + c (Z Y)². Eigenvalues below 1e-6 |V|_F count as larger
    ones, those of 0 as 2e-9. Zeros for a V of zeros.
    """
    size = torch.linalg.matrix_norm(v)
    z = torch.eye(v.shape[0], dtype=v.dtype, device=v.device)
    y = torch.where(size > 0, v / size, z)
    for i in range(ROOT_STEPS):
        a, b, c = POLAR_EXPRESS[min(i, len(POLAR_EXPRESS) - 1)]
        if i < len(POLAR_EXPRESS) - 1:
            a, b, c = a / SAFETY, b / SAFETY**3, c / SAFETY**5
        product = z @ y
        p = torch.addmm(product, product, product, beta=b, alpha=c)
        p.diagonal().add_(a)
        y, z = y @ p, p @ z
    return torch.where(size > 0, z, 0)


class OneSided(Spectral):
    """X = 0.2 sqrt(R's elements) U / |U|_F, U = V^(-1/2) M with V = EMA(R Rᵀ) on the short side, U = M V^(-1/2) with EMA(RᵀR).

    M <- momentum M + (1 - momentum) R, V <- beta2 V + (1 - beta2) R Rᵀ. State beside M: `gram` (k, k) fp32, k the short side.
    """

    name, defaults = "one-sided", {"momentum": 0.9, "beta2": 0.8}
    state = {"exp_avg": Moment(signed=True), "gram": Moment(axis=SHORT)}
    unsharded = "its Gram matrix is of the short side, which may be that of the rows"
    transports = ("keep",)  # what is in the coordinates of an old basis is soon forgotten, with beta2

    def update(self, r, s, h):
        tall = r.shape[0] > r.shape[1]
        s.exp_avg.lerp_(r, 1 - h["momentum"])
        s.gram = h["beta2"] * s.gram + (1 - h["beta2"]) * (r.T @ r if tall else r @ r.T)
        root = inverse_root(s.gram)
        u = s.exp_avg @ root if tall else root @ s.exp_avg
        size = torch.linalg.vector_norm(u)
        return torch.where(size > 0, u * (RMS * math.sqrt(r.numel()) / size), 0)
