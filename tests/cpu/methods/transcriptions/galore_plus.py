"""GaLore+: singular vectors of one head's gradient, Adam in their span, and on whole matrices where the sparse code has it."""

import math

import torch
from transcriptions import adam, following, leading, on_the_left


@on_the_left
def galore_plus(weight, gradients, *, heads, heads_drawn, first_gap, rank, gap, scale, density, lr, betas, eps, weight_decay):
    """Heads are blocks of columns. Moments of all entries are kept, and of the code's entries used."""
    w, out, h, p, refresh = weight.clone(), [], {"betas": betas, "eps": eps}, None, 0
    m, v = (torch.zeros(rank, weight.shape[1], dtype=weight.dtype) for _ in range(2))
    whole_m, whole_v = torch.zeros_like(w), torch.zeros_like(w)
    columns, width = w.shape[1], math.ceil(w.shape[1] / heads)
    for t, g in enumerate(gradients):
        if t == 0 or (t - first_gap) % gap == 0:
            count = min(columns, width * math.ceil(rank / width))
            start = min(width * heads_drawn[refresh], columns - count)
            p, refresh = following(leading(g[:, start : start + count], rank), p), refresh + 1
        if t == 0:
            left_out = (g - p @ p.T @ g).abs()
            coded = left_out >= left_out.flatten().topk(math.ceil(density * w.numel())).values[-1]
        low = p @ adam(m, v, p.T @ g, t + 1, h)
        update = torch.where(coded, adam(whole_m, whole_v, g, t + 1, h), low)
        w = (1 - lr * weight_decay) * w - lr * scale * update
        out.append(w)
    return out
