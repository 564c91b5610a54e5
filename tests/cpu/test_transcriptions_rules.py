"""Methods whose own idea is the rule, against straight transcriptions of their papers in fp64.

A transcription imports nothing of the package. It takes (W (m, n), gradients, left, hyper) and returns W after every step.
"""

import math

import pytest
import torch
from torch import nn

from lowrank_sys import optim

STEPS, GAP, RANK, LR, DECAY = 8, 4, 3, 1e-2, 0.1
COMMON = {"lr": LR, "weight_decay": DECAY}
SHAPES = {"wide": (8, 12), "tall": (12, 8), "square": (9, 9)}


# --- the formulas


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


# --- what is held against them

LOW = {"rank": RANK, "update_proj_gap": GAP, "subspace": "svd"}
PLAIN = {"nesterov": False, "ns_steps": 3}
# (optimizer, arguments, group keys, formula, its hyper-parameters)
PAPERS = {
    "muon": (optim.Muon, {}, {"rank": None}, whole(muon), {}),
    "muon, no Nesterov": (optim.Muon, PLAIN, {"rank": None}, whole(muon), PLAIN),
    "muon in a subspace": (optim.Muon, {"momentum": 0.9}, LOW, galore(muon), {"momentum": 0.9}),
    "asgo": (optim.ASGO, {}, {"rank": None}, whole(asgo), {}),
    "asgo in a subspace": (optim.ASGO, {"momentum": 0.8}, LOW, galore(asgo), {"momentum": 0.8}),
    "mofasgd": (optim.MoFaSGD, {}, {"rank": RANK}, mofasgd, {}),
    "mofasgd, the rest too": (
        optim.MoFaSGD, {}, {"rank": RANK, "momentum": 0.8, "scale": 0.5, "residual_scale": 0.1},
        mofasgd, {"momentum": 0.8, "scale": 0.5, "residual_scale": 0.1},
    ),
    "lisa, where all layers are drawn": (optim.LISA, {"active_layers": 9}, {"rank": None}, whole(adam), {}),
    "owlore, where all layers are drawn": (optim.OwLore, {"active_layers": 9}, {**LOW, "scale": 0.5}, galore(adam, 0.5), {}),
    "grades, before anything settles": (optim.GradES, {"grace": 99}, {"rank": None}, whole(adam), {}),
    "gradnormlorp": (optim.GradNormLoRP, {}, LOW, gradnormlorp, {}),
    "galore-lion": (optim.GaLoreLion, {}, LOW, galore(lion), {}),
}  # fmt: skip


def gradients(shape, steps=STEPS):
    """Of a few strong directions that drift, over noise."""
    generator = torch.Generator().manual_seed(1)
    u, v = torch.randn(shape[0], 3, generator=generator), torch.randn(3, shape[1], generator=generator)
    for _ in range(steps):
        u = u + 0.2 * torch.randn(u.shape, generator=generator)
        yield u * torch.tensor([4.0, 2.0, 1.0]) @ v + 0.1 * torch.randn(shape, generator=generator)


@pytest.mark.parametrize("scaler", [False, True], ids=["plain", "GradScaler"])
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("paper", PAPERS)
def test_every_step_is_the_paper_s(paper, shape, left, scaler):
    cls, arguments, keys, formula, h = PAPERS[paper]
    torch.manual_seed(0)
    matrix = nn.Parameter(torch.randn(shape))
    sides = {} if keys["rank"] is None else {"proj_type": "left" if left else "right"}
    optimizer = cls([{"params": [matrix], **sides, **keys}], **COMMON, **arguments)
    grads = list(gradients(shape))
    expected = formula(matrix.detach().double(), [g.double() for g in grads], left, **h)
    for t, (g, want) in enumerate(zip(grads, expected)):
        matrix.grad = g * 1024 if scaler else g
        if scaler:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.zeros(())
        optimizer.step()
        torch.testing.assert_close(matrix.detach().double(), want, atol=1e-5, rtol=1e-5, msg=lambda m: f"step {t}: {m}")


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_gum_s_steps_are_the_paper_s(left):
    """Three layers of one matrix each, one of them whole at a time; which one is the method's draw."""
    torch.manual_seed(0)
    shapes, period = [(8, 12), (12, 8), (9, 9)], 3
    matrices = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    named = [(f"layers.{i}.weight", matrix) for i, matrix in enumerate(matrices)]
    keys = {**LOW, "update_proj_gap": period, "proj_type": "left" if left else "right"}
    optimizer = optim.GUM([{"params": named, **keys}], **COMMON)
    starts = [matrix.detach().double() for matrix in matrices]
    series, seen, drawn = [list(gradients(shape, 4 * period)) for shape in shapes], [[] for _ in shapes], [[] for _ in shapes]
    for t in range(4 * period):
        for matrix, grads in zip(matrices, series):
            matrix.grad = grads[t]
        optimizer.step()
        for i, matrix in enumerate(matrices):
            seen[i].append(matrix.detach().double())
            if t % period == 0:
                drawn[i].append("outside" in optimizer.state[matrix])
    assert [sum(one) for one in zip(*drawn)] == [1] * 4 and len({tuple(one) for one in zip(*drawn)}) > 1
    for start, grads, got, whole_ones in zip(starts, series, seen, drawn):
        expected = gum(start, [g.double() for g in grads], left, whole=whole_ones, q=1 / 3, period=period)
        # G is some 100 times what the basis leaves of it; NS lifts the rounding of that, 6e-8 of G, by up to 3.4445^5 = 485, and a
        # step has the factor 0.2 sqrt(12) lr: 2e-5 a step
        torch.testing.assert_close(torch.stack(got), torch.stack(expected), atol=1e-4, rtol=0)
