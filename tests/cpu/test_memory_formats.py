"""Weights whose memory is not laid out by rows train as in torch's AdamW, whenever they came so, in a state of logical order."""

import copy

import pytest
import torch
from torch import nn

from lowrank_sys import optim


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 16))


def volumes():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 8, 8))


NETS = {
    "channels_last": (convolutions, torch.channels_last, (2, 4, 8, 8)),
    "channels_last_3d": (volumes, torch.channels_last_3d, (2, 2, 4, 4, 4)),
}


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def ours(params, cls=optim.GaLoreAdamW, **options):
    return cls(params, lr=1e-2, weight_decay=0.1, **options)


def train(net, optimizer, steps, shape):
    for step in steps:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_close(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        torch.testing.assert_close(p.contiguous(), q.contiguous(), rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("when", ["before", "after", "between steps"])
@pytest.mark.parametrize("kind", NETS)
def test_as_adamw(kind, when):
    build, memory_format, shape = NETS[kind]
    nets = []
    for make in (adamw, ours):
        net = build()
        if when == "before":
            net = net.to(memory_format=memory_format)
        optimizer = make(list(net.parameters()))
        if when == "after":
            net = net.to(memory_format=memory_format)
        train(net, optimizer, range(2), shape)
        if when == "between steps":
            net = net.to(memory_format=memory_format)
        train(net, optimizer, range(2, 4), shape)
        nets.append(net)
    assert nets[1][0].weight.is_contiguous(memory_format=memory_format)
    assert_close(*nets)


def test_the_format_may_change_between_save_and_load():
    build, memory_format, shape = NETS["channels_last"]
    net = build().to(memory_format=memory_format)
    optimizer = ours(list(net.parameters()))
    train(net, optimizer, range(3), shape)
    assert all(value.is_contiguous() for state in optimizer.state.values() for value in state.values())
    other = build()
    other.load_state_dict(net.state_dict())
    resumed = ours(list(other.parameters()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, optimizer, range(3, 6), shape)
    train(other, resumed, range(3, 6), shape)
    assert_close(net, other)


@pytest.mark.parametrize(
    "cls, options",
    [
        (optim.GaLoreAdamW, {}),
        (optim.GaLoreAdamW8bit, {"min_8bit_size": 0}),
        (optim.FiraAdamW, {}),
        (optim.FrugalAdamW, {}),
        (optim.APOLLOAdamW, {}),
        (optim.GrassAdamW, {}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("keys", [{}, {"rank": 3}], ids=["plain", "low-rank"])
def test_a_transposed_matrix(cls, options, keys):
    weight = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    params = nn.Parameter(weight.clone().T), nn.Parameter(weight.T.contiguous())
    for param in params:
        optimizer = ours([{"params": [param], **keys}], cls, **options)
        for step in range(4):
            grad = torch.randn(9, 6, generator=torch.Generator().manual_seed(step + 1))
            param.grad = grad.T if param is params[0] else grad.T.contiguous()
            optimizer.step()
    assert params[0].stride() == (1, 6)
    assert torch.equal(params[0], params[1]) and not torch.equal(params[0], weight.T)


@pytest.mark.parametrize("per_layer", ["accumulate", "in_backward"])
def test_a_transposed_layer_with_hooks(per_layer):
    nets = []
    for transposed in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12))
        if transposed:
            for layer in (net[0], net[2]):
                layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
        optimizer = ours(optim.param_groups(net, rank=4), per_layer=per_layer)
        train(net, optimizer, range(4), (8, 12))
        nets.append(net)
    assert_close(*nets)
