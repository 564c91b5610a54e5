"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; scaled as Liu et al. 2025, arXiv:2502.16982)."""

from lowrank_sys.optim.preset import Preset, method
from lowrank_sys.optim.rules import Muon as Rule
from lowrank_sys.subspace.optional import OrWhole


@method("muon", lr=1e-2, plain_lr=3e-3, rank=None)
class Muon(Preset):
    """W <- (1 - lr*wd) W - lr 0.2 sqrt(max(m, n)) NS(momentum M + (1 - momentum) G), M <- momentum M + (1 - momentum) G.

    In a group with a `rank` the same of R, and W <- (1 - lr*wd) W - lr*scale*back(X); group keys as GaLoreAdamW's, `scale` 0.25.
    With rank None on the gradient itself. Groups without the key `rank` are AdamW. Arguments beside Preset's: `momentum` (0.95),
    `nesterov` (True), `ns_steps` (5). Jordan's factor is sqrt(max(1, m/n)) in place of 0.2 sqrt(max(m, n)), and his M a sum, whose
    scale NS does not see. State of a matrix: `exp_avg` of its shape, or of R's, and the basis and its schedule.
    """

    rule, subspace = Rule(), OrWhole()
