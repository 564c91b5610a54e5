"""Projected layers on the device: the losses of the CPU, also where the model comes there after its optimizer is built."""

import pytest
import torch
from torch import nn

from lowrank_sys.nn import project_model
from lowrank_sys.optim import GaLoreAdamW, param_groups


def build(side):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 32))
    project_model(model, 16, side)
    return model, GaLoreAdamW(param_groups(model, rank=16, update_proj_gap=4), lr=1e-2, eps=1e-3)


def train(model, optimizer, device):
    losses = []
    for step in range(12):
        x = torch.randn(128, 48, generator=torch.Generator().manual_seed(step)).to(device)
        loss = model(x).sub(x[:, :32]).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("side", ["left", "right"])
def test_losses(side):
    """The device draws other Gaussians: of the first step the loss is the CPU's, later ones are as good."""
    here, there = build(side), build(side)
    there[0].to("cuda")
    ours, theirs = train(*here, "cpu"), train(*there, "cuda")
    assert ours[0] == pytest.approx(theirs[0], rel=1e-3)
    assert ours[-1] == pytest.approx(theirs[-1], rel=0.1) and theirs[-1] < theirs[0]
    for layer in there[0]:
        if hasattr(layer, "projection"):
            state = there[1].state[layer.weight]
            here = {key for key, value in state.items() if isinstance(value, torch.Tensor) and not value.is_cuda}
            assert here <= {"countdown", "missed"}
            assert layer.coefficient.untyped_storage().nbytes() == 4 and layer.projection.basis[0] is state["basis"]
