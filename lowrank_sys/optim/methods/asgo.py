"""ASGO (An et al. 2025, arXiv:2503.20762): the momentum preconditioned on its short side."""

from lowrank_sys.optim.preset import Preset, method
from lowrank_sys.optim.rules import OneSided
from lowrank_sys.subspace.optional import OrWhole


@method("asgo", lr=5e-3, plain_lr=3e-3, rank=None)
class ASGO(Preset):
    """W <- (1 - lr*wd) W - lr 0.2 sqrt(m n) U / |U|_F, U = V^(-1/2) M, V = EMA(G Gᵀ) (m <= n; else M V^(-1/2), V = EMA(GᵀG)).

    In a group with a `rank` the same of R, where V is (r, r), and W <- (1 - lr*wd) W - lr*scale*back(X); group keys as
    GaLoreAdamW's, `scale` 0.25. With rank None on the gradient itself. Groups without the key `rank` are AdamW. Arguments beside
    Preset's: `momentum` (0.9), `beta2` (0.8). The paper adds eps = 1e-10 to V^(1/2); here the ten steps of the root (the default
    of its code) bound what they divide by. Its code preconditions heads of queries and keys one by one; here a matrix is one.
    State of a matrix: `exp_avg` of its shape, or of R's, `gram` (k, k) fp32, k the short side, and the basis and its schedule.
    """

    rule, subspace = OneSided(), OrWhole()
