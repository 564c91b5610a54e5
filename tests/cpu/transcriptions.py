"""Methods as their papers have them, in fp64 on whole tensors: nothing of the package, and nothing of its composition.

Each is a function of (W (m, n), gradients, left, hyper) and returns W after every step. `first`: a first basis (d, r), where the
paper draws one. Bases are (d, r); on the right a matrix is transposed, so that every formula is one of a left basis.
"""

import math

import torch


def on_the_left(method):
    """A formula for left bases, also for right ones."""

    def either(weight, gradients, left, **h):
        if left:
            return method(weight, gradients, **h)
        return [w.T for w in method(weight.T, [g.T for g in gradients], **h)]

    return either


def leading(g, rank):
    return torch.linalg.svd(g, full_matrices=False)[0][:, :rank]


def following(new, old):
    """Singular vectors have no sign of their own: here those of the basis before them, or of their largest entries."""
    sign = (old * new).sum(0) if old is not None else new.gather(0, new.abs().argmax(0, keepdim=True))
    return new * torch.where(sign < 0, -1, 1)


def adam(m, v, r, t, h):
    """Advances m and v; returns the update."""
    (b1, b2), eps = h["betas"], h["eps"]
    m.mul_(b1).add_((1 - b1) * r)
    v.mul_(b2).add_((1 - b2) * r * r)
    return (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)


@on_the_left
def fira_lion(weight, gradients, *, rank, gap, alpha, lr, betas, weight_decay):
    w, m, p, limit, out = weight.clone(), torch.zeros(rank, weight.shape[1], dtype=weight.dtype), None, None, []
    for t, g in enumerate(gradients):
        if t % gap == 0:
            p = following(leading(g, rank), p)
        r = p.T @ g
        x = (betas[0] * m + (1 - betas[0]) * r).sign()
        m = betas[1] * m + (1 - betas[1]) * r
        s = (g - alpha * p @ r) * (x.norm(dim=0) / (r.norm(dim=0) + 1e-8))
        norm = s.norm()
        if limit is not None:
            growth = (norm / (limit + 1e-8)).clamp(min=1.01) / 1.01
            s, norm = s / growth, norm / growth
        limit = norm
        w = (1 - lr * weight_decay) * w - lr * (alpha * p @ x + s)
        out.append(w)
    return out


def coap_basis(g, basis, rank):
    """Vᵀ of QᵀG, Q from QR of G B, for G (channels, d)."""
    q = torch.linalg.qr(g @ basis).Q
    return torch.linalg.svd(q.T @ g, full_matrices=False).Vh[:rank].T


def coap_loss(b, g, m):
    """MSE(back(R), G) (1 - mean cos(back(M), G)) on (channels, d) matrices."""
    error = torch.nn.functional.mse_loss(g @ b @ b.T, g)
    return error * (1 - torch.nn.functional.cosine_similarity(m @ b.T, g, dim=1).mean())


@on_the_left
def coap(weight, gradients, *, first, first_gap, rank, gap, reproject_factor, scale, lr, betas, eps, weight_decay, roots=False):
    w, out, h = weight.clone(), [], {"betas": betas, "eps": eps}
    b, refresh = first, 0
    m, v = (torch.zeros(rank, weight.shape[1], dtype=weight.dtype) for _ in range(2))
    for t, g in enumerate(gradients):
        if t == 0 or (t - first_gap) % gap == 0:
            old = b
            if refresh % reproject_factor == 0:
                b = following(coap_basis(g.T, b, rank), old if refresh > 0 else None)
            else:
                leaf = b.clone().requires_grad_()
                (step,) = torch.autograd.grad(coap_loss(leaf, g.T, m.T), leaf)
                b = b - 0.1 * step * min(1.0, 1.0 / step.norm().item())
            if roots and refresh > 0:
                m, v = b.T @ (old @ m), (b.T @ (old @ v.sqrt())) ** 2
            refresh += 1
        update = adam(m, v, b.T @ g, t + 1, h)
        w = (1 - lr * weight_decay) * w - lr * scale * b @ update
        out.append(w)
    return out


@on_the_left
def ldadam(weight, gradients, *, rank, rho, scale, lr, betas, eps, weight_decay):
    w, out, h, (b1, b2) = weight.clone(), [], {"betas": betas, "eps": eps}, betas
    m, v = (torch.zeros(rank, weight.shape[1], dtype=weight.dtype) for _ in range(2))
    kept = torch.zeros_like(weight)  # the error
    for t, new in enumerate(gradients):
        g = new + kept
        if t == 0:
            p, moved = leading(g, rank), 0
        else:
            old, c1, c2 = p, 1 - b1**t, 1 - b2**t
            b = rho * old @ m / c1 + (1 - rho) * g
            p = torch.linalg.qr(b @ (b.T @ old)).Q
            c = p.T @ old
            before, after = m, c @ m
            v = (c2 * ((c * c) @ (v / c2 - (m / c1) ** 2) + (after / c1) ** 2)).abs()
            m, moved = after, b1 / (1 - b1) * (old @ before - p @ after)
        r = p.T @ g
        kept = g - p @ r + moved
        w = (1 - lr * weight_decay) * w - lr * scale * p @ adam(m, v, r, t + 1, h)
        out.append(w)
    return out


def scale(weight, gradients, left, *, over, momentum, lr, weight_decay):
    w, buffer, out = weight.clone(), 0, []
    for g in gradients:
        buffer = momentum * buffer + (1 - momentum) * g
        rms = buffer.square().mean(1 if over == "rows" else 0, keepdim=True).sqrt().clamp(min=1e-8)
        w = (1 - lr * weight_decay) * w - lr * buffer / rms
        out.append(w)
    return out


def sinkgd(weight, gradients, left, *, passes, lr, weight_decay):
    w, out, (m, n) = weight.clone(), [], weight.shape
    for x in gradients:
        for _ in range(passes):
            x = math.sqrt(n) * x / x.norm(dim=1, keepdim=True)
            x = math.sqrt(m) * x / x.norm(dim=0, keepdim=True)
        w = (1 - lr * weight_decay) * w - lr * x
        out.append(w)
    return out
