"""States of another optimizer: refused when they are loaded, with the key that is missing or too much, and nothing has changed."""

import copy

import pytest
import torch
from torch import nn

from lowrank_sys import optim

METHODS = {
    "galore": (optim.GaLoreAdamW, {}),
    "galore8bit": (optim.GaLoreAdamW8bit, {"min_8bit_size": 0}),
    "q-galore": (optim.QGaLoreAdamW8bit, {"min_8bit_size": 0}),
    "adafactor": (optim.GaLoreAdafactor, {"relative_step": False}),
    "apollo": (optim.APOLLOAdamW, {}),
    "fira": (optim.FiraAdamW, {}),
    "frugal": (optim.FrugalAdamW, {}),
    "grass": (optim.GrassAdamW, {}),
}
# These differ in the keys of a group alone, which come along: they load into each other.
ALIKE = {frozenset(("galore", "frugal")), frozenset(("galore8bit", "q-galore"))}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(20, 12), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 20, bias=False))


def build(method, **keys):
    net = model()
    cls, options = METHODS[method]
    return net, cls(optim.param_groups(net, rank=4, **keys), lr=1e-2, **options)


def train(net, optimizer, steps=2):
    for step in range(steps):
        ids = torch.arange(10) + step
        nn.functional.cross_entropy(net(ids), ids).backward()
        optimizer.step()
        optimizer.zero_grad()


def contents(optimizer):
    return copy.deepcopy(
        [
            optimizer.state_dict()["state"],
            [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups],
        ]
    )


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("target", METHODS)
@pytest.mark.parametrize("source", METHODS)
def test_a_state_loads_into_its_own_kind_alone(source, target):
    net, optimizer = build(source)
    train(net, optimizer)
    other_net, other = build(target)
    train(other_net, other, steps=1)
    before = contents(other)
    if source == target or frozenset((source, target)) in ALIKE:
        other.load_state_dict(optimizer.state_dict())
    else:
        with pytest.raises(ValueError, match="lacks|too, |too$|must be torch|it has|must be one of|must be False"):
            other.load_state_dict(optimizer.state_dict())
        assert equal(contents(other), before)
    train(other_net, other)


@pytest.mark.parametrize("target", METHODS)
def test_adamw_has_no_rank_to_give(target):
    net = model()
    plain = torch.optim.AdamW([{"params": [p]} for p in net.parameters()][:2], lr=1e-2)
    train(net, plain)
    other_net, other = build(target)
    before = contents(other)
    with pytest.raises(ValueError, match="group 1 must have the key 'rank'"):
        other.load_state_dict(plain.state_dict())
    assert equal(contents(other), before) and "rank" in other.param_groups[1]
    train(other_net, other)


def test_plain_groups_take_up_adamw():
    """A plain group is AdamW, so its checkpoint goes on here as it would there."""
    ours, theirs = model(), model()
    torch_optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    train(theirs, torch_optimizer, steps=3)
    ours.load_state_dict(theirs.state_dict())
    optimizer = optim.GaLoreAdamW(ours.parameters(), lr=1e-2)
    optimizer.load_state_dict(copy.deepcopy(torch_optimizer.state_dict()))
    train(ours, optimizer, steps=3)
    train(theirs, torch_optimizer, steps=3)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_amsgrad_is_another_rule():
    net = model()
    theirs = torch.optim.AdamW(net.parameters(), lr=1e-2, amsgrad=True)
    train(net, theirs)
    ours = optim.GaLoreAdamW(net.parameters(), lr=1e-2)
    with pytest.raises(ValueError, match="it has max_exp_avg_sq too"):
        ours.load_state_dict(theirs.state_dict())


def test_a_basis_of_a_wider_type_is_taken_up():
    net, optimizer = build("galore")
    train(net, optimizer)
    narrow = model().bfloat16()
    other = optim.GaLoreAdamW(optim.param_groups(narrow, rank=4), lr=1e-2)
    other.load_state_dict(optimizer.state_dict())
    basis = other.state[narrow[1].weight]["basis"]
    assert basis.dtype == torch.float32
    assert torch.equal(basis, optimizer.state[net[1].weight]["basis"])


def shorter(state):
    state["exp_avg"] = state["exp_avg"][:-1]


def wider(state):
    state["exp_avg_sq"] = torch.cat([state["exp_avg_sq"], state["exp_avg_sq"]], dim=-1)


def transposed(state):
    state["exp_avg"] = state["exp_avg"].T.contiguous()


def broadcast(state):
    state["exp_avg_sq"] = state["exp_avg_sq"][..., :1]


def vector(state):
    state["step"] = state["step"].repeat(2)


@pytest.mark.parametrize("spoil", [shorter, wider, transposed, broadcast, vector])
@pytest.mark.parametrize("method", ["galore", "apollo", "fira"])
@pytest.mark.parametrize("name", ["0.weight", "1.weight"])
def test_a_tensor_of_another_shape(method, name, spoil):
    net, optimizer = build(method)
    train(net, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    names = [n for group in state["param_groups"] for n in group["param_names"]]
    spoil(state["state"][names.index(name)])
    other_net, other = build(method)
    train(other_net, other, steps=1)
    before = contents(other)
    with pytest.raises(ValueError, match=f"the loaded state of {name}: .* must be .* of shape .*, got .* of shape"):
        other.load_state_dict(state)
    assert equal(contents(other), before)
    train(other_net, other)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_state_of_another_rank(method, steps):
    net, optimizer = build(method)
    train(net, optimizer, steps)
    other_net = model()
    cls, options = METHODS[method]
    other = cls(optim.param_groups(other_net, rank=3), lr=1e-2, **options)
    before = contents(other)
    with pytest.raises(ValueError, match="rank of the loaded group 1 must be 3, as of this optimizer's, got 4"):
        other.load_state_dict(optimizer.state_dict())
    assert equal(contents(other), before) and other.param_groups[1]["rank"] == 3
    train(other_net, other)


@pytest.mark.parametrize(
    "refused",
    [
        lambda net: {"params": [("a", net[0].weight)]},  # already in a group: torch's rule
        lambda net: {"params": [("a", "no tensor")]},
        lambda net: {"params": [("a", net[1].weight)], "rank": "four"},
        lambda net: {"params": [("a", net[1].bias)], "rank": 4},
        lambda net: {"params": [("a", net[1].weight)], "lr": -1},
    ],
)
def test_a_refused_group_leaves_no_names(refused):
    net = model()
    optimizer = optim.GaLoreAdamW([net[0].weight], lr=1e-2)
    with pytest.raises((ValueError, TypeError)):
        optimizer.add_param_group(refused(net))
    assert len(optimizer.param_groups) == 1 and "param_names" not in optimizer.param_groups[0]
    optimizer.add_param_group({"params": [net[1].weight], "rank": 4})
    train(net, optimizer)
