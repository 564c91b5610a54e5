"""refactorize: the two factors of a weight balanced anew, and the optimizer's momentum of them dropped (WR + MR)."""

import torch
from torch import nn

from lowrank_sys.lora.pairs import pairs


@torch.no_grad()
def refactorize(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, adapter: str | None = None) -> int:
    """Share the singular values of every pair's B A between its factors; returns how many pairs there are.

    With B A = U S Vᵀ: B = U sqrt(S), A = sqrt(S) Vᵀ, so that W is as it was and neither factor is much larger than the other
    (Glentis et al. 2025, arXiv:2505.22922: weight refactorization and momentum reset). Call it between steps, every few hundred.

    A direction with a tiny singular value keeps an A that is not: with both at 0 it would never train again. So a pair with B = 0
    stays as it is.

    Args:
        model: with factored layers, or LoRA adapters of peft.
        optimizer: whose state of the pairs is dropped, moments and count of steps: they are of the old factors. None: no one's.
        adapter: of peft; all by default.
    """
    found = pairs(model, adapter)
    for pair in found:
        _balance_(pair.A, pair.B)
        if optimizer is not None:
            for param in (pair.A, pair.B):
                optimizer.state.pop(param, None)
    return len(found)


def _balance_(A, B):
    """By a QR of each factor and an SVD of r x r."""
    wide = torch.promote_types(A.dtype, torch.float32)
    q_b, r_b = torch.linalg.qr(B.to(wide))
    q_a, r_a = torch.linalg.qr(A.to(wide).T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    if s[0] > 0:
        share = s.clamp(min=torch.finfo(A.dtype).eps * s[0]).sqrt()
        B.copy_(q_b @ (u * (s / share)))
        A.copy_((share[:, None] * vh) @ q_a.T)
