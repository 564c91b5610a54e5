"""Rows of the gradient (Grass), and Gaussian bases, through layers of low-rank gradients: (rows of dY)ᵀ X."""

import pytest
import torch
from small_model import CLOSE, LR, assert_same, backward, build, groups, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_sys.nn import project_model
from lowrank_sys.optim import GrassAdamW
from lowrank_sys.optim.optimizer import LowRankOptimizer
from lowrank_sys.optim.pipeline import Pipeline
from lowrank_sys.optim.rules import Adam
from lowrank_sys.subspace.keys import Gaussian
from lowrank_sys.subspace.sketched_rows import COLUMNS

BOTH = pytest.mark.parametrize("side", ["left", "right"])
EACH = pytest.mark.parametrize("subspace", ["top", "sample", "sample_replace"])
EPS = 1e-3


def grass(model, per_layer=None, **keys):
    return GrassAdamW(groups(model, **keys), lr=LR, eps=EPS, weight_decay=0.1, per_layer=per_layer)


def matrices(optimizer):
    return [p for p in optimizer.param_groups[1]["params"] if optimizer.state.get(p)]


@EACH
@BOTH
def test_the_run_of_optimizer_side_grass(side, subspace):
    """With the same rows; the gradients are narrow enough for norms that are exact."""
    model = project_model(build(), 16, side)
    optimizer = grass(model, subspace=subspace)
    train(model, optimizer, range(16), micro=2)
    for per_layer in (None, "accumulate"):
        other = build()
        theirs = grass(other, per_layer, subspace=subspace, proj_type=side, refresh="next")
        train(other, theirs, range(16), micro=2)
        assert_same(model, other, **CLOSE)
        for ours, his in zip(matrices(optimizer), matrices(theirs)):
            assert torch.equal(optimizer.state[ours]["indices"], theirs.state[his]["indices"])
    assert all(optimizer.state[p]["refreshes"] >= 3 for p in matrices(optimizer))


@BOTH
def test_rows_are_those_of_the_largest_norms(side):
    """Of the gradient that was sketched, which never was."""
    model, other = project_model(build(), 16, side), build()
    optimizer = grass(model)
    due = optimizer.gradients.announced()
    backward(model, 0)
    backward(other, 0)
    optimizer.step()
    for name, p in model.named_parameters():
        if name in due:
            norms = other.get_parameter(name).grad.norm(dim=1 if side == "left" else 0)
            assert set(optimizer.state[p]["indices"].tolist()) == set(norms.topk(16).indices.tolist())
    assert due


class Shapes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not any(made.data_ptr() == a.data_ptr() for a in args if isinstance(a, torch.Tensor)):
            self.seen.add(tuple(sorted(made.shape)))
        return made


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Linear(320, 288)

    def forward(self, x):
        return self.one(x)


@BOTH
def test_norms_from_a_sketch(side):
    """Where the gradient is wider than Omega, squared norms are right to sqrt(2 / l), and neither G nor a basis is made."""
    torch.manual_seed(1)
    x, g = torch.randn(200, 320), torch.randn(200, 288) * torch.linspace(0.1, 3, 288)
    model = project_model(Wide(), 16, side)
    optimizer = grass(model)
    assert optimizer.gradients.announced() == ["one.weight"]
    x.requires_grad_(True)
    y = model(x)
    with Shapes() as made:
        y.backward(g)
    assert (288, 320) not in made.seen
    sketch = optimizer.gradients.window.sketches[model.one.weight].total
    axis = 1 if side == "left" else 0
    assert sketch.shape == ((288, COLUMNS) if side == "left" else (COLUMNS, 320))
    error = (sketch.square().sum(axis) / (g.T @ x.detach()).square().sum(axis) - 1).detach()
    assert error.std() < 1.3 * (2 / COLUMNS) ** 0.5 and error.mean().abs() < 0.04
    optimizer.step()
    assert optimizer.state[model.one.weight]["refreshes"] == 1


def test_what_a_layer_keeps_on_the_right():
    """The columns of X that are selected, and X where norms are due."""
    model = project_model(build(), 16, "right")
    optimizer, found = grass(model, update_proj_gap=50), set()
    for step in range(6):
        for layer in (model[1], model[3]):
            kept = {}
            with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t}) or t, lambda t: t):
                layer(torch.randn(20, layer.in_features))
            shapes = {tuple(t.shape) for t in kept.values() if 20 in t.shape}
            due = layer.projection.omega is not None
            assert shapes == ({(20, 16), (20, layer.in_features)} if due else {(20, 16)})
            found.add(due)
        train(model, optimizer, [step])
    assert found == {True, False}


def test_sketches_of_zeros_select_nothing():
    """Rows stay as they were drawn, and due."""
    model = project_model(Wide(), 16, "left")
    optimizer = grass(model)
    state = optimizer.state[model.one.weight]
    rows = state["indices"].clone()
    assert len(rows.unique()) == 16 and rows.max() > 16
    model(torch.randn(8, 320)).mul(0).sum().backward()
    optimizer.step()
    assert state["refreshes"] == 0 and optimizer.gradients.announced() == ["one.weight"]


@BOTH
def test_a_gaussian_basis_that_is_never_in_memory(side):
    def optimizer_of(model, per_layer=None, **keys):
        defaults = {"lr": LR, "betas": (0.9, 0.999), "eps": EPS, "weight_decay": 0.1}
        return LowRankOptimizer(groups(model, **keys), Pipeline(Adam(), subspace=Gaussian()), defaults, per_layer=per_layer)

    model, other = project_model(build(), 16, side), build()
    train(model, optimizer_of(model), range(10), micro=2)
    train(other, optimizer_of(other, "accumulate", proj_type=side), range(10), micro=2)
    assert_same(model, other, **CLOSE)


class Reads(nn.Module):
    """q_proj, k_proj and v_proj on one input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 48)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(48, size) for size in (48, 32, 32))
        self.out, self.head = nn.Linear(112, 48), nn.Linear(48, 50)

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(self.out(torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1).tanh()))


@EACH
def test_layers_that_read_one_input(subspace):
    """Share the rows of the largest norms in all their gradients; rows that are drawn are each layer's own."""
    model = project_model(Reads(), 16, "right", share=True)
    optimizer = grass(model, subspace=subspace)
    members = [model.q_proj, model.k_proj, model.v_proj]
    chosen = set()
    for step in range(12):
        due = optimizer.gradients.announced()
        if subspace == "top" and "q_proj.weight" in due:
            plain = Reads()
            plain.load_state_dict(model.state_dict())
            backward(plain, step)
            grads = torch.cat([getattr(plain, name).weight.grad for name in ("q_proj", "k_proj", "v_proj")])
            best = set(grads.norm(dim=0).topk(16).indices.tolist())
        train(model, optimizer, [step])
        rows = [set(optimizer.state[layer.weight]["indices"].tolist()) for layer in members]
        if subspace == "top":
            assert rows[0] == rows[1] == rows[2]
            if "q_proj.weight" in due:
                assert rows[0] == best
        chosen.add(tuple(sorted(rows[0])))
    assert len(chosen) >= 3
    if subspace != "top":
        other = project_model(Reads(), 16, "right")
        train(other, grass(other, subspace=subspace), range(12))
        assert_same(model, other)
