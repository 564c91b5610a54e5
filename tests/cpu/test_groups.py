"""Groups as models make them: empty, named or not, and with matrices that are narrower than the rank."""

import warnings

import pytest
import torch
from torch import nn

from lowrank_sys import optim
from lowrank_sys.nn import quantize_model


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40, bias=False), nn.Tanh(), nn.Linear(40, 24, bias=False))


def assert_trains(net, optimizer):
    before = [p.detach().clone() for p in net.parameters() if p.requires_grad]
    for _ in range(3):
        net(torch.ones(8, 24)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = [not torch.equal(p, q) for p, q in zip((p for p in net.parameters() if p.requires_grad), before) if p.numel()]
    assert moved and all(moved)


@pytest.mark.parametrize("per_layer", [None, "accumulate", "in_backward"])
@pytest.mark.parametrize("method", ["GaLoreAdamW", "GaLoreAdamW8bit"])
def test_nothing_is_plain(method, per_layer):
    net = mlp()
    groups = optim.param_groups(net, rank=4)
    assert groups[0]["params"] == []
    assert_trains(net, getattr(optim, method)(groups, lr=1e-2, per_layer=per_layer))


@pytest.mark.parametrize("first", ["named", "unnamed", "empty"])
@pytest.mark.parametrize("second", ["named", "unnamed"])
def test_names_in_some_groups_alone(first, second):
    net = mlp()
    a, b = net[0].weight, net[2].weight
    plain = {"named": [("a", a)], "unnamed": [a], "empty": []}[first]
    matrices = {"named": [("b", b)], "unnamed": iter([b])}[second]
    if first == "empty":
        a.requires_grad_(False)
    optimizer = optim.GaLoreAdamW([{"params": plain}, {"params": matrices, "rank": 4}], lr=1e-2)
    named = ["param_names" in group for group in optimizer.param_groups]
    assert named in ([True, True], [False, False]) and named[1] == ("named" in (first, second))
    assert_trains(net, optimizer)


def test_an_empty_group_is_added_later():
    net = mlp()
    optimizer = optim.GaLoreAdamW(optim.param_groups(net, rank=4), lr=1e-2)
    optimizer.add_param_group({"params": []})
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert [len(group["param_names"]) for group in optimizer.param_groups] == [0, 2, 0, 1]
    assert_trains(net, optimizer)
    resumed = optim.GaLoreAdamW(optim.param_groups(mlp(), rank=4), lr=1e-2)
    for params in ([], [nn.Parameter(torch.ones(3))]):
        resumed.add_param_group({"params": params})
    resumed.load_state_dict(optimizer.state_dict())


class Gated(nn.Module):
    """A gate of one row beside matrices, and a layer without outputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.gate, self.down = nn.Linear(24, 40, bias=False), nn.Linear(24, 1, bias=False), nn.Linear(40, 24, bias=False)
        self.empty = nn.Linear(24, 0)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x))) * torch.sigmoid(self.gate(x)) + self.empty(x).sum()


def ranks(groups):
    return {name: group.get("rank") for group in groups for name, _ in group["params"]}


def test_a_narrow_matrix_is_plain_and_that_is_said_once():
    net = Gated()
    with pytest.warns(
        UserWarning, match="2 linear layers are narrower than rank 8 and train in the plain group: gate.weight, empty.weight"
    ) as said:
        groups = optim.param_groups(net, rank=8)
    assert len(said) == 1
    assert ranks(groups) == {"up.weight": 8, "down.weight": 8, "gate.weight": None, "empty.weight": None, "empty.bias": None}
    assert_trains(net, optim.APOLLOAdamW(groups, lr=1e-2))


def test_a_narrow_matrix_trains_at_the_rank_it_has():
    net = Gated()
    with pytest.warns(UserWarning, match="at the rank they have"):
        groups = optim.param_groups(net, rank=30, narrow="own", scale=0.5)
    assert ranks(groups) == {"up.weight": 24, "down.weight": 24, "gate.weight": 1, "empty.weight": None, "empty.bias": None}
    assert all(group["scale"] == 0.5 for group in groups if "rank" in group)
    assert_trains(net, optim.GaLoreAdamW(groups, lr=1e-2))


def test_an_int8_weight_has_no_plain_group_to_go_to():
    net = Gated()
    net.empty = nn.Identity()
    net.forward = lambda x: net.down(torch.tanh(net.up(x))) * torch.sigmoid(net.gate(x))
    quantize_model(net)
    with pytest.warns(UserWarning, match="at the rank they have: gate.weight"):
        groups = optim.param_groups(net, rank=8)
    assert ranks(groups)["gate.weight"] == 1
    optim.GaLoreAdamW8bit(groups, lr=1e-2)


def test_nothing_to_say_where_all_fit():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optim.param_groups(mlp(), rank=24)


@pytest.mark.parametrize(
    "rank, narrow, message",
    [
        (25, "plain", r"rank must be at most 24 for 0.weight of shape \(40, 24\), got 25"),
        (4, "drop", "narrow must be 'plain' or 'own', got 'drop'"),
    ],
)
def test_bad_arguments(rank, narrow, message):
    with pytest.raises(ValueError, match=message):
        optim.param_groups(mlp(), rank=rank, narrow=narrow)
