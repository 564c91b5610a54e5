"""Online Subspace Descent (Liang et al., NeurIPS 2024, arXiv:2408.12857): a basis that learns beside the weights."""

import torch

from lowrank_sys.optim.preset import Preset, method
from lowrank_sys.subspace.basis import axis_of
from lowrank_sys.subspace.iteration import svd_basis
from lowrank_sys.subspace.select import SELECT, Selector

BETAS, EPS = (0.9, 0.999), 1e-8  # of Adam on the basis


class OnlineDescent(Selector):
    """After each step one of Adam on |back(R) - G|² / |G|² + orthogonality |BᵀB - I|², at `basis_rate` times the step's rate.

    Its gradient takes products of R's size alone. A first basis is the SVD's. Keeps `basis_exp_avg` and `basis_exp_avg_sq`, of the
    basis's shape in fp32.
    """

    hyper, counts, staggered, orthonormal, late = {"basis_rate": 1.0, "orthogonality": 1.0}, True, False, False, True
    sharded = True
    categories = {"basis_exp_avg": "moments", "basis_exp_avg_sq": "moments"}

    def init(self, state, param, group):
        shape = axis_of(param.shape, state), group["rank"]
        for key in self.categories:
            state[key] = torch.zeros(shape, dtype=torch.float32, device=param.device)

    def choose(self, due):
        if due.old is None:
            return svd_basis(due.gradient, None, rank=due.rank, left=due.left, shard=due.shard)
        g, b = due.gradient.float() if due.left else due.gradient.float().T, due.old.float()  # (d, channels), (d, r)
        total = due.shard.sum  # over channels
        size = due.shard.norms(torch.linalg.vector_norm(g))
        valid = size.isfinite() & (size > 0)
        g = torch.where(valid, g / size, 0)
        r, gram = b.T @ g, b.T @ b
        slope = 2 * b @ total(r @ r.T) + total(g @ (2 * gram @ r - 4 * r).T)
        slope += 4 * due.h["orthogonality"] * (b @ gram - b)
        step = int(due.state["refreshes"])
        moments = [due.state[key] for key in self.categories]
        for moment, value, beta in zip(moments, (slope, slope.square()), BETAS):
            moment.copy_(torch.where(valid, beta * moment + (1 - beta) * value, moment))
        first, second = (moment / (1 - beta**step) for moment, beta in zip(moments, BETAS))
        update = due.h["basis_rate"] * due.lr * first / (second.sqrt() + EPS)
        return torch.where(valid, b - update, b), torch.where(valid, total(r.square().sum(1)), 0)


SELECT["online"] = OnlineDescent()


@method("osd", lr=5e-3, plain_lr=3e-3, subspace="online", update_proj_gap=1)
class OnlineSubspaceDescent(Preset):
    """GaLoreAdamW on a basis that takes a step of its own after every step of the weights, which used the basis before it.

    Group keys: those of GaLoreAdamW; `update_proj_gap` (1), `basis_rate` (1: the basis learns at the weights' rate, along with
    its schedule), `orthogonality` (1). The authors' code has no such term, and decays the basis.
    State of a matrix: that of GaLoreAdamW, `refreshes`, and OnlineDescent's two moments of the basis.
    """

    low_rank_defaults = {"subspace": "online", "update_proj_gap": 1}
