"""DCT-AdamW: selection by the l1 norm of S = DᵀG, Adam on the rows of S that are selected, moments matched by index."""

import math

import torch
from transcriptions import adam, on_the_left


def matrix(d):
    """The orthonormal DCT-II, a column a frequency."""
    i, k = torch.arange(d, dtype=torch.float64)[:, None], torch.arange(d, dtype=torch.float64)
    return (math.pi * (2 * i + 1) * k / (2 * d)).cos() * torch.where(k == 0, 1 / d, 2 / d).sqrt()


@on_the_left
def dct(weight, gradients, *, rank, gap, scale, lr, betas, eps, weight_decay, power=1, feedback=False):
    w, out, h = weight.clone(), [], {"betas": betas, "eps": eps}
    d, kept, old = matrix(weight.shape[0]), torch.zeros_like(weight), None
    m, v = (torch.zeros(rank, weight.shape[1], dtype=weight.dtype) for _ in range(2))
    for t, new in enumerate(gradients):
        g = new + kept
        if t == 0 or (t - 1) % gap == 0:
            q = d[:, (d.T @ g).abs().pow(power).sum(1).topk(rank).indices.sort().values]
            if old is not None:
                turn = q.T @ old
                m, v = turn @ m, (turn @ v).abs()
            old = q
        r = q.T @ g
        kept = g - q @ r if feedback else kept
        w = (1 - lr * weight_decay) * w - lr * scale * q @ adam(m, v, r, t + 1, h)
        out.append(w)
    return out
