"""LDAdam (Robert et al. 2024, arXiv:2410.16103): a basis that is renewed at every step, and the error of projecting fed back."""

import torch

from lowrank_sys.optim.preset import Preset, method
from lowrank_sys.optim.remainder import ErrorFeedback
from lowrank_sys.optim.types import Betas, Params, Rate
from lowrank_sys.subspace.iteration import orthonormalize, svd_basis
from lowrank_sys.subspace.select import SELECT, Selector
from lowrank_sys.subspace.transport import TRANSPORTS, Transport, corrected, follow


class PowerStep(Selector):
    """QR of one power step on rho back(M) + (1 - rho) G from the old basis; a first one is the exact SVD's."""

    moments, hyper, staggered, sharded = ("exp_avg", "exp_avg_sq", "step", "error"), {"rho": 0.908}, False, True

    def choose(self, due):
        if due.old is None:
            return svd_basis(due.gradient, None, rank=due.rank, left=due.left, shard=due.shard)
        g = due.gradient.float() if due.left else due.gradient.float().T  # (d, channels)
        old, rho, m = due.old.float(), due.h["rho"], corrected(due)[0]
        other = rho * (m.T @ (old.T @ old)) + (1 - rho) * (g.T @ old)
        y = rho * (old @ due.shard.sum(m @ other)) + (1 - rho) * due.shard.sum(g @ other)
        size = torch.linalg.vector_norm(y)
        valid = size.isfinite() & (size > 0)
        new = torch.where(valid, orthonormalize(torch.where(valid, y, old), passes=3), old)
        return new, torch.where(valid, y.square().sum(0), 0)


def covariance(due, old, new, kept):
    """Moments follow the basis; what M loses joins the error."""
    before, after = follow(due, old, new, kept)
    lost = torch.cat([before, -after], 0 if due.left else 1)  # as one product: an error in bf16 is rounded once
    lost = torch.where(kept, 0, lost * (due.h["beta1"] / (1 - due.h["beta1"])))
    torch.ops.lowrank.back_project_(due.state["error"], lost, torch.cat([old, new], 1), left=due.left)


SELECT["power"] = PowerStep()
TRANSPORTS["covariance"] = Transport(covariance, needs=("exp_avg", "exp_avg_sq", "error"), sharded=True)


@method("ldadam", lr=2e-3, plain_lr=3e-3, scale=1.0, subspace="power", update_proj_gap=1)
class LDAdamW(Preset):
    """Adam in a basis that takes one power step before every step, with projection-aware moments and error feedback.

    Group keys: `rank`, `rho` (0.908, the share of the momentum in what the basis follows), `proj_type`, `scale` (1). betas
    (0.908, 0.99). State of a matrix: that of GaLoreAdamW, and `error`; the authors keep it in `.grad`, and project a square matrix
    on the left, where 'std' is the right.
    """

    remainder = ErrorFeedback()
    low_rank_defaults = {"subspace": "power", "moments": "covariance", "update_proj_gap": 1}

    def __init__(self, params: Params, lr: Rate = 1e-3, betas: Betas = (0.908, 0.99), **options) -> None:
        super().__init__(params, lr, betas=betas, **options)
