"""Each step of every method against a transcription of its paper in fp64, which imports nothing of the package."""

import pytest
import torch
from methods.inputs import ADAM, COMMON, GAP, STEPS, gradients, matrix_of
from methods.transcriptions.dct import dct
from methods.transcriptions.flora import flora
from methods.transcriptions.frugal import frugal
from methods.transcriptions.galore_plus import galore_plus
from methods.transcriptions.osd import osd
from methods.transcriptions.rules import adam, asgo, galore, gradnormlorp, gum, lion, mofasgd, muon, whole
from methods.transcriptions.sara import sara
from methods.transcriptions.snsm import snsm
from methods.transcriptions.subtrack import subtrack
from torch import nn
from transcriptions import coap, fira_lion, ldadam, scale, sinkgd

from lowrank_sys.optim.preset import METHODS
from lowrank_sys.subspace.gaussian import gaussian_basis
from lowrank_sys.subspace.iteration import seeded_basis

LOW = {"rank": 3, "update_proj_gap": GAP, "subspace": "svd"}
PLAIN = {"nesterov": False, "ns_steps": 3}
# A method, and how it is set up: (arguments, group keys, transcription, its hyper-parameters)
PAPERS = {
    "fira-lion": (
        {}, {"rank": 3, "update_proj_gap": GAP, "subspace": "svd", "alpha": 0.25},
        fira_lion, {**COMMON, "rank": 3, "gap": GAP, "alpha": 0.25, "betas": (0.9, 0.99)},
    ),
    "coap": (
        {}, {"rank": 3, "update_proj_gap": 2, "reproject_factor": 3},
        coap, {**ADAM, "rank": 3, "gap": 2, "reproject_factor": 3, "scale": 1.0},
    ),
    "coap, moments carried": (
        {}, {"rank": 3, "update_proj_gap": 2, "reproject_factor": 3, "moments": "rotate-roots", "scale": 0.5},
        coap, {**ADAM, "rank": 3, "gap": 2, "reproject_factor": 3, "scale": 0.5, "roots": True},
    ),
    "ldadam": (
        {}, {"rank": 3},
        ldadam, {**ADAM, "betas": (0.908, 0.99), "rank": 3, "rho": 0.908, "scale": 1.0},
    ),
    "scale": ({}, {"rank": None}, scale, {**COMMON, "over": "rows", "momentum": 0.0}),
    "scale, an embedding": (
        {}, {"rank": None, "over": "columns"}, scale, {**COMMON, "over": "columns", "momentum": 0.0},
    ),
    "scale, a head": (
        {}, {"rank": None, "momentum": 0.9}, scale, {**COMMON, "over": "rows", "momentum": 0.9},
    ),
    "sinkgd": ({}, {"rank": None}, sinkgd, {**COMMON, "passes": 5}),
    "dct": ({}, {"rank": 3}, dct, {**ADAM, "rank": 3, "gap": 1, "scale": 1.0}),
    "dct, l2 at a gap": (
        {}, {"rank": 3, "update_proj_gap": 3, "subspace": "l2", "scale": 0.5},
        dct, {**ADAM, "rank": 3, "gap": 3, "scale": 0.5, "power": 2},
    ),
    "dct, error feedback": (
        {"error_feedback": True}, {"rank": 3}, dct, {**ADAM, "rank": 3, "gap": 1, "scale": 1.0, "feedback": True},
    ),
    "sara": ({}, {"rank": 3, "update_proj_gap": 4}, sara, {**ADAM, "rank": 3, "gap": 4, "scale": 0.25}),
    "sara, moments kept": (
        {}, {"rank": 3, "update_proj_gap": 4, "moments": "keep", "scale": 1.0},
        sara, {**ADAM, "rank": 3, "gap": 4, "scale": 1.0, "carried": False},
    ),
    "osd": (
        {}, {"rank": 3},
        osd, {**ADAM, "rank": 3, "gap": 1, "scale": 0.25, "rate": 1.0, "orthogonality": 1.0},
    ),
    "osd, every third step": (
        {}, {"rank": 3, "update_proj_gap": 3, "basis_rate": 2.0, "orthogonality": 0.5, "scale": 1.0},
        osd, {**ADAM, "rank": 3, "gap": 3, "scale": 1.0, "rate": 2.0, "orthogonality": 0.5},
    ),
    "subtrack": (
        {}, {"rank": 3, "update_proj_gap": 2, "geodesic_step": 1e-4},
        subtrack, {**ADAM, "eps": 1e-6, "rank": 3, "gap": 2, "step": 1e-4, "alpha": 0.25},
    ),
    "subtrack, a far step": (
        {}, {"rank": 3, "update_proj_gap": 3, "geodesic_step": 1e-3, "alpha": 1.0},
        subtrack, {**ADAM, "eps": 1e-6, "rank": 3, "gap": 3, "step": 1e-3, "alpha": 1.0},
    ),
    "flora": ({}, {"rank": 3, "update_proj_gap": 4}, flora, {**COMMON, "gap": 4, "scale": 1.0, "beta1": 0.9}),
    "flora, slower": (
        {"beta1": 0.5}, {"rank": 3, "update_proj_gap": 100, "scale": 0.5},
        flora, {**COMMON, "gap": 100, "scale": 0.5, "beta1": 0.5},
    ),
    "snsm": (
        {}, {"rank": 3, "update_proj_gap": 4, "subspace": "svd"},
        snsm, {**ADAM, "eps": 1e-6, "rank": 3, "gap": 4, "scale": 1.0},
    ),
    "snsm, momentum kept": (
        {"eps": 1e-3}, {"rank": 3, "update_proj_gap": 4, "subspace": "svd", "moments": "keep", "scale": 0.5},
        snsm, {**ADAM, "eps": 1e-3, "rank": 3, "gap": 4, "scale": 0.5, "cleared": False},
    ),
    "galore-plus": (
        {"residual_density": 0.1}, {"rank": 3, "update_proj_gap": 4, "heads": 2},
        galore_plus, {**ADAM, "rank": 3, "gap": 4, "scale": 0.25, "heads": 2, "density": 0.1},
    ),
    "galore-plus, narrow heads": (
        {"residual_density": 1.0}, {"rank": 3, "update_proj_gap": 4, "heads": 4, "scale": 1.0},
        galore_plus, {**ADAM, "rank": 3, "gap": 4, "scale": 1.0, "heads": 4, "density": 1.0},
    ),
    "frugal, random": (
        {}, {"rank": 3, "update_proj_gap": 4, "subspace": "random", "residual_scale": 0.5},
        frugal, {**ADAM, "gap": 4, "scale": 1.0, "residual_scale": 0.5, "choice": "random"},
    ),
    "frugal, random with SGD": (
        {"inactive_update_rule": "sgd"}, {"rank": 3, "update_proj_gap": 4, "subspace": "random", "scale": 0.5},
        frugal, {**ADAM, "gap": 4, "scale": 0.5, "residual_scale": 1.0, "choice": "random", "sign": False},
    ),
    "frugal-columns": (
        {"choice": "columns"}, {"rank": 3, "update_proj_gap": 4},
        frugal, {**ADAM, "gap": 4, "scale": 1.0, "residual_scale": 1.0, "choice": "columns"},
    ),
    "frugal-columns, SGD": (
        {"choice": "columns", "inactive_update_rule": "sgd"}, {"rank": 3, "update_proj_gap": 4, "residual_scale": 0.1},
        frugal, {**ADAM, "gap": 4, "scale": 1.0, "residual_scale": 0.1, "choice": "columns", "sign": False},
    ),
    "muon": ({}, {"rank": None}, whole(muon), {}),
    "muon, no Nesterov": (PLAIN, {"rank": None}, whole(muon), PLAIN),
    "muon, in a subspace": ({"momentum": 0.9}, LOW, galore(muon), {"momentum": 0.9}),
    "asgo": ({}, {"rank": None}, whole(asgo), {}),
    "asgo, in a subspace": ({"momentum": 0.8}, LOW, galore(asgo), {"momentum": 0.8}),
    "mofasgd": ({}, {"rank": 3}, mofasgd, {}),
    "mofasgd, the rest too": (
        {}, {"rank": 3, "momentum": 0.8, "scale": 0.5, "residual_scale": 0.1},
        mofasgd, {"momentum": 0.8, "scale": 0.5, "residual_scale": 0.1},
    ),
    "lisa, where all layers are drawn": ({"active_layers": 9}, {"rank": None}, whole(adam), {}),
    "owlore, where all layers are drawn": ({"active_layers": 9}, {**LOW, "scale": 0.5}, galore(adam, 0.5), {}),
    "grades, before anything settles": ({"grace": 99}, {"rank": None}, whole(adam), {}),
    "gradnormlorp": ({}, LOW, gradnormlorp, {}),
    "galore-lion": ({}, LOW, galore(lion), {}),
}  # fmt: skip
SHAPES = {"wide": (8, 12), "tall": (12, 8), "square": (9, 9)}


def random_basis(d, refresh):
    return seeded_basis(d, 3, refresh << 32, torch.zeros(())).double()


def columns_of(d, refresh):
    """Three columns of the identity, drawn all alike."""
    indices, _ = torch.ops.lowrank.select_rows(torch.ones(d), r=3, method="sample", seed=0, step=refresh, parameter=0)
    assert len(set(indices.tolist())) == 3
    return torch.eye(d, dtype=torch.float64)[:, indices]


def drawn(formula, shape, left, h):
    """`h` with what the method draws, which a transcription is handed."""
    if formula is sara:
        shapes = {"d": 2, "rank": min(shape), "seed": 0, "parameter": 0}
        h = {**h, "exponentials": [gaussian_basis(step=i, **shapes).square().sum(0) for i in range(STEPS)]}
    if formula is galore_plus:
        draws = [torch.Generator().manual_seed(i << 32) for i in range(STEPS)]
        h = {**h, "first_gap": 1, "heads_drawn": [int(torch.randint(h["heads"], (), generator=draw)) for draw in draws]}
    if formula is frugal:
        d, choice = shape[0 if left else 1], h["choice"]
        h = {key: value for key, value in h.items() if key != "choice"}
        h |= {"first_gap": 1, "bases": [random_basis(d, i) if choice == "random" else columns_of(d, i) for i in range(STEPS)]}
    if formula is flora:
        where = {"d": shape[0 if left else 1], "rank": 3, "seed": 0, "parameter": 0}
        h = {**h, "bases": [gaussian_basis(step=i, **where).double() for i in range(STEPS // h["gap"] + 1)]}
    if formula is coap:
        h = {**h, "first_gap": 1, "first": random_basis(shape[0 if left else 1], 0)}
    return h


@pytest.mark.parametrize("scaler", [False, True], ids=["plain", "GradScaler"])
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("paper", PAPERS)
def test_every_step_is_the_paper_s(paper, shape, left, scaler):
    arguments, keys, formula, h = PAPERS[paper]
    matrix = nn.Parameter(matrix_of(shape))
    sides = {} if keys["rank"] is None else {"proj_type": "left" if left else "right"}
    group = {"params": [matrix], **sides, **keys}
    optimizer = METHODS[paper.split(",")[0]].optimizer([group], **COMMON, **arguments)
    grads = list(gradients(shape))
    expected = formula(matrix.detach().double(), [g.double() for g in grads], left, **drawn(formula, shape, left, h))
    assert len(expected) == len(grads)
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
    optimizer = METHODS["gum"].optimizer([{"params": named, **keys}], **COMMON)
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
