"""Online Subspace Descent: Adam on W in the span of P, then Adam on P by autograd of the paper's loss."""

import torch
from transcriptions import adam, following, leading, on_the_left


def loss(p, g, orthogonality):
    return (p @ p.T @ g - g).square().sum() + orthogonality * (p.T @ p - torch.eye(p.shape[1], dtype=p.dtype)).square().sum()


@on_the_left
def osd(weight, gradients, *, rank, gap, scale, rate, weight_decay, lr, betas, eps, orthogonality):
    w, out, h = weight.clone(), [], {"betas": betas, "eps": eps}
    m, v = (torch.zeros(rank, weight.shape[1], dtype=weight.dtype) for _ in range(2))
    pm, pv, steps = torch.zeros_like(weight[:, :rank]), torch.zeros_like(weight[:, :rank]), 0
    for t, g in enumerate(gradients):
        if t == 0:
            p = following(leading(g, rank), None)
        w = (1 - lr * weight_decay) * w - lr * scale * p @ adam(m, v, p.T @ g, t + 1, h)
        out.append(w)
        if t > 0 and t % gap == 0:  # the first basis is stationary: the slope of its own gradient is 0
            leaf, steps = p.clone().requires_grad_(), steps + 1
            (slope,) = torch.autograd.grad(loss(leaf, g / g.norm(), orthogonality), leaf)
            p = p - rate * lr * adam(pm, pv, slope, steps, {"betas": (0.9, 0.999), "eps": 1e-8})
    return out
