"""SubTrack++: the geodesic from the SVD of the tangent, cut to rank one; moments, recovery scaling and its limiter."""

import torch
from transcriptions import following, leading, on_the_left


def tracked(s, g, step):
    """S(step), from the derivative of |S A - G|² by S at the best A."""
    a = torch.linalg.lstsq(s, g).solution
    derivative = -2 * (g - s @ a) @ a.T
    u, sigma, vh = torch.linalg.svd(derivative, full_matrices=False)
    u, sigma, v = u[:, :1], sigma[0], vh[:1].T
    identity = torch.eye(len(v), dtype=v.dtype)
    return s @ v * (sigma * step).cos() @ v.T - u * (sigma * step).sin() @ v.T + s @ (identity - v @ v.T)


@on_the_left
def subtrack(weight, gradients, *, rank, gap, step, alpha, lr, betas, eps, weight_decay):
    w, out, (b1, b2), limit = weight.clone(), [], betas, None
    m, v = (torch.zeros(rank, weight.shape[1], dtype=weight.dtype) for _ in range(2))
    for t, g in enumerate(gradients):
        if t == 0:
            s = following(leading(g, rank), None)
        elif t % gap == 0:
            old, s = s, tracked(s, g, step)
            c, c1, c2 = s.T @ old, 1 - b1**t, 1 - b2**t
            v = c2 * ((c * c) @ (v / c2 - (m / c1) ** 2) + (c @ (m / c1)) ** 2).abs()
            m = c @ m
        r = s.T @ g
        m, v = b1 * m + (1 - b1) * r, b2 * v + (1 - b2) * r * r
        n = m / (v.sqrt() + eps)
        rest = (g - s @ r) * (n.norm(dim=0) / (r.norm(dim=0) + 1e-8))
        norm = rest.norm()
        if limit is not None:
            growth = (norm / (limit + 1e-8)).clamp(min=1.01) / 1.01
            rest, norm = rest / growth, norm / growth
        limit = norm
        rate = lr * (1 - b2 ** (t + 1)) ** 0.5 / (1 - b1 ** (t + 1))
        w = (1 - lr * weight_decay) * w - rate * (alpha * s @ n + rest)
        out.append(w)
    return out
