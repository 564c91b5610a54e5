"""Methods whose own idea is the rule, which takes a gradient, or what a basis leaves of it, and returns an update.

A rule is a function of hyper-parameters that returns such a function; `whole` and `galore` make a method of one, of (W (m, n),
gradients, left, hyper), which returns W after every step.
"""

import math

import torch

GAP, RANK, LR, DECAY = 4, 3, 1e-2, 0.1


def stepped(weight, update):
    return (1 - LR * DECAY) * weight - LR * update


def whole(rule):
    """A rule, a function that takes a gradient and returns an update, on the gradient itself."""

    def method(weight, gradients, left, **h):
        update, out = rule(**h), []
        for g in gradients:
            weight = stepped(weight, update(g))
            out.append(weight)
        return out

    return method


def galore(rule, scale=0.25):
    """A rule on the gradient's leading singular directions."""

    def method(weight, gradients, left, **h):
        update, basis, out = rule(**h), None, []
        for t, g in enumerate(gradients):
            if t % GAP == 0:
                u, _, vh = torch.linalg.svd(g, full_matrices=False)
                new = u[:, :RANK] if left else vh[:RANK].T
                sign = new.gather(0, new.abs().argmax(0, keepdim=True)) if basis is None else (basis * new).sum(0)
                basis = new * torch.where(sign < 0, -1, 1)
            x = scale * update(basis.T @ g if left else g @ basis)
            weight = stepped(weight, basis @ x if left else x @ basis.T)
            out.append(weight)
        return out

    return method


def muon(momentum=0.95, nesterov=True, ns_steps=5):
    m = 0

    def update(g):
        nonlocal m
        m = momentum * m + g  # Jordan's; NS does not see its scale
        x = g + momentum * m if nesterov else m
        x = x / x.norm()
        for _ in range(ns_steps):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return 0.2 * math.sqrt(max(g.shape)) * x

    return update


def asgo(momentum=0.9, beta2=0.8):
    m, v = 0, 0

    def root(a):
        values, vectors = torch.linalg.eigh(a)
        return vectors @ torch.diag(values.clamp(min=0).rsqrt()) @ vectors.T

    def update(g):
        nonlocal m, v
        m = momentum * m + (1 - momentum) * g
        tall = g.shape[0] > g.shape[1]
        v = beta2 * v + (1 - beta2) * (g.T @ g if tall else g @ g.T)
        u = m @ root(v) if tall else root(v) @ m
        return 0.2 * math.sqrt(g.numel()) * u / u.norm()

    return update


def lion(betas=(0.9, 0.99)):
    m = 0

    def update(g):
        nonlocal m
        x = (betas[0] * m + (1 - betas[0]) * g).sign()
        m = betas[1] * m + (1 - betas[1]) * g
        return x

    return update


def adam(betas=(0.9, 0.999), eps=1e-8):
    m, v, t = 0, 0, 0

    def update(g):
        nonlocal m, v, t
        t += 1
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        return m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + eps)

    return update


def gum(weight, gradients, left, *, whole, q, period, momentum=0.95):
    """whole: whether it is, one period after the other."""
    out = []
    for t, g in enumerate(gradients):
        if t % period == 0:
            u, _, vh = torch.linalg.svd(g, full_matrices=False)
            p = u[:, :RANK] if left else vh[:RANK].T
            update = muon(momentum, nesterov=False)
        if whole[t // period]:
            x = update((g - (p @ p.T @ g if left else g @ p @ p.T)) / q)
        else:
            x = update((p.T @ g if left else g @ p) / (1 - q))
            x = p @ x if left else x @ p.T
        weight = stepped(weight, x)
        out.append(weight)
    return out


def gradnormlorp(weight, gradients, left, scale=0.25):
    """W = g V / |V| by rows, g and V anew from W before every step."""
    lengths, directions, basis, out = adam(), adam(), None, []
    for t, g in enumerate(gradients):
        length = weight.norm(dim=1, keepdim=True)
        slope = (g * weight / length).sum(1, keepdim=True)
        if t % GAP == 0:
            u, _, vh = torch.linalg.svd(g, full_matrices=False)
            new = u[:, :RANK] if left else vh[:RANK].T
            sign = new.gather(0, new.abs().argmax(0, keepdim=True)) if basis is None else (basis * new).sum(0)
            basis = new * torch.where(sign < 0, -1, 1)
        x = directions(basis.T @ g if left else g @ basis)
        v = weight - LR * scale * (basis @ x if left else x @ basis.T)
        new = (length - LR * lengths(slope)) * v / v.norm(dim=1, keepdim=True)
        weight = new - LR * DECAY * weight
        out.append(weight)
    return out


def mofasgd(weight, gradients, left, momentum=0.95, scale=1.0, residual_scale=0.0):
    u = values = v = None
    out = []
    for g in gradients:
        if u is None:
            m = g
        else:
            tangent = u @ u.T @ g + g @ v @ v.T - u @ u.T @ g @ v @ v.T
            m = momentum * u @ torch.diag(values) @ v.T + tangent
        u, values, vh = torch.linalg.svd(m, full_matrices=False)
        u, values, v = u[:, :RANK], values[:RANK], vh[:RANK].T
        rest = g - u @ u.T @ g
        weight = stepped(weight, scale * u @ v.T + residual_scale * (rest - rest @ v @ v.T))
        out.append(weight)
    return out
