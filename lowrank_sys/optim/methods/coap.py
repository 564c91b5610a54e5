"""COAP (Xiao et al. 2024, arXiv:2412.00071): a basis that follows the gradient and the first moment by steps of its own."""

import torch

from lowrank_sys.optim.preset import Preset, method
from lowrank_sys.subspace.iteration import DEPENDENT, canonical_signs, cholesky_qr, seeded_basis
from lowrank_sys.subspace.select import SELECT, Selector
from lowrank_sys.subspace.transport import TRANSPORTS, Transport, rotated, rotation

RATE, CLIP = 0.1, 1.0  # of a step on the basis


class CorrelationAware(Selector):
    """Every `reproject_factor`-th time Vᵀ of QᵀG, Q from QR of G B; else one SGD step on B.

    Its loss is MSE(back(R), G) (1 - mean cos(back(M), G)), the cosine by channel, and takes products of R's size alone:
    |back(R) - G|² = |G|² - 2|R|² + tr((BᵀB)(RᵀR)). B stays as the step leaves it. Signs of Vᵀ follow the old basis, so that moments
    that are kept mean one direction; the authors take those of the SVD.
    """

    moments, hyper, counts, sized, orthonormal = ("exp_avg",), {"reproject_factor": 5}, True, True, False
    sharded = True

    def choose(self, due):
        g = due.gradient.float().T if due.left else due.gradient.float()  # (channels, d)
        shard, size = due.shard, due.shard.norms(torch.linalg.vector_norm(g))
        valid = size.isfinite() & (size > 0)
        g = torch.where(valid, g, 0)
        old = seeded_basis(g.shape[1], due.rank, due.seed, g) if due.old is None else due.old.float()
        if due.old is None or int(due.state["refreshes"]) % int(due.h["reproject_factor"]) == 0:
            y = g @ old
            q = cholesky_qr(y, passes=5, shifts=DEPENDENT, shard=shard) if shard.group else torch.linalg.qr(y).Q
            _, _, vh = torch.linalg.svd(torch.where(valid, shard.sum(q.T @ g), 0), full_matrices=False)
            new = canonical_signs(vh[: due.rank].T.contiguous(), due.old)
        else:
            new = self._stepped(old, g, due.moment("exp_avg").T if due.left else due.moment("exp_avg"), shard)
        valid = valid & new.isfinite().all()
        new = torch.where(valid, new, old)
        return new, torch.where(valid, shard.sum((g @ new).square().sum(0)), 0)

    def _stepped(self, b, g, m, shard):
        """b less the step; g, m: G and M with a channel a row, of which shard has some."""
        total, count = shard.sum, shard.rows or len(g)
        r, gram, channels, size = g @ b, b.T @ b, torch.linalg.vector_norm(g, dim=1), count * g.shape[1]
        outer = total(r.T @ r)
        error = (total(channels.square().sum()) - 2 * total(r.square().sum()) + (gram * outer).sum()) / size
        slope = (2 * b @ outer + total(g.T @ (2 * r @ gram - 4 * r))) / size
        lengths = ((m @ gram) * m).sum(1, keepdim=True).clamp(min=1e-16).sqrt()
        weight = 1 / (lengths * channels.clamp(min=1e-8).unsqueeze(1) * count)
        cosines = weight * (m * r).sum(1, keepdim=True)  # that add up to their mean
        turn = total(g.T @ (weight * m)) - b @ total(m.T @ (cosines / lengths.square() * m))
        step = slope * (1 - total(cosines.sum())) - error * turn
        return b - RATE * step * (CLIP / step.norm().clamp(min=CLIP))


def rotate_roots(due, old, new, kept):
    """M <- C M and V <- (C sqrt(V))²."""
    c = rotation(old, new, torch.float32)
    for name, signed in due.moments.items():
        moment = due.moment(name)
        due.write(name, rotated(moment, c, left=due.left) if signed else rotated(moment.sqrt(), c, left=due.left).square(), kept)


SELECT["coap"] = CorrelationAware()
TRANSPORTS["rotate-roots"] = Transport(rotate_roots, sharded=True)


@method("coap", lr=2e-3, plain_lr=3e-3, scale=1.0, subspace="coap", update_proj_gap=32)
class COAPAdamW(Preset):
    """GaLoreAdamW on bases of CorrelationAware, calibrated anew at every fifth refresh (`reproject_factor`).

    Group keys: those of GaLoreAdamW; `update_proj_gap` (32), `scale` (1), `moments` (keep | rotate-roots: the authors'
    restore_state). Refreshes are spread over the matrices. With bits=8 the authors' 8-bit variant.
    State of a matrix: that of GaLoreAdamW, and `refreshes`.
    """

    low_rank_defaults = {"subspace": "coap", "update_proj_gap": 32, "scale": 1.0}
