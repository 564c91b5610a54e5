"""Subset-norm with subspace momentum: a subset is a column here, as channels of a left basis are."""

import torch
from transcriptions import following, leading, on_the_left


@on_the_left
def snsm(weight, gradients, *, rank, gap, scale, lr, betas, eps, weight_decay, cleared=True):
    w, out, (b1, b2), p = weight.clone(), [], betas, None
    m, v = torch.zeros(rank, weight.shape[1], dtype=weight.dtype), torch.zeros(weight.shape[1], dtype=weight.dtype)
    for t, g in enumerate(gradients):
        if t % gap == 0:
            p, m = following(leading(g, rank), p), torch.zeros_like(m) if cleared else m
        m = b1 * m + (1 - b1) * p.T @ g
        v = b2 * v + (1 - b2) * g.square().sum(0)
        rate = lr * (1 - b2 ** (t + 1)) ** 0.5 / (1 - b1 ** (t + 1))
        w = (1 - lr * weight_decay) * w - rate * scale * (p @ m + g - p @ p.T @ g) / (v.sqrt() + eps)
        out.append(w)
    return out
