"""FRUGAL: Adam, begun anew with each basis, in its span, and signSGD or SGD outside."""

import torch
from transcriptions import adam, on_the_left


@on_the_left
def frugal(weight, gradients, *, bases, first_gap, gap, scale, residual_scale, lr, betas, eps, weight_decay, sign=True):
    """bases: (d, r), one after another."""
    w, out, h, refresh, count = weight.clone(), [], {"betas": betas, "eps": eps}, 0, 0
    for t, g in enumerate(gradients):
        if t == 0 or (t - first_gap) % gap == 0:
            p, refresh, count = bases[refresh], refresh + 1, 0
            m, v = (torch.zeros(p.shape[1], w.shape[1], dtype=w.dtype) for _ in range(2))
        count += 1
        rest = g - p @ p.T @ g
        update = scale * p @ adam(m, v, p.T @ g, count, h) + residual_scale * (rest.sign() if sign else rest)
        w = (1 - lr * weight_decay) * w - lr * update
        out.append(w)
    return out
