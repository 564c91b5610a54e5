"""Hyper-parameters as files, sweeps and numpy give them: taken for what they are, or refused by key when an optimizer is built."""

import numpy as np
import pytest
import torch
from torch import nn

from lowrank_sys import optim

ADAM = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
LOW_RANK = {"rank": 4, "update_proj_gap": 3, "refresh_every": 2, "seed": 1}
GALORE = {
    **LOW_RANK,
    "scale": 0.25,
    "quant": False,
    "int8_gemm": False,
    "cos_threshold": 0.4,
    "gamma_proj": 2,
    "queue_size": 2,
    "max_update_proj_gap": 6,
    "proj_type": "std",
    "subspace": "randomized",
    "moments": "keep",
    "refresh": "now",
}
# Optimizer -> (its arguments, its group keys), each with a value that it takes.
METHODS = {
    "GaLoreAdamW": (ADAM, GALORE),
    "GaLoreAdamW8bit": ({**ADAM, "min_8bit_size": 0}, GALORE),
    "QGaLoreAdamW8bit": (ADAM, {**GALORE, "quant": True, "quant_n_bit": 4, "quant_group_size": 32}),
    "GaLoreAdafactor": (
        {
            "lr": 1e-2,
            "eps": (1e-30, 1e-3),
            "clip_threshold": 1.0,
            "decay_rate": -0.8,
            "beta1": 0.9,
            "weight_decay": 0.0,
            "scale_parameter": True,
            "relative_step": False,
            "warmup_init": False,
        },
        {**LOW_RANK, "scale": 0.25},
    ),
    "APOLLOAdamW": (ADAM, {**LOW_RANK, "scale": 1.0, "proj": "random", "scale_type": "channel"}),
    "FiraAdamW": (ADAM, {**LOW_RANK, "alpha": 0.25}),
    "FrugalAdamW": (ADAM, {**LOW_RANK, "scale": 1.0, "residual_scale": 1.0}),
    "GrassAdamW": (ADAM, {**LOW_RANK, "scale": 0.25, "subspace": "top", "moments": "reset"}),
}
# None is a value of these.
OPTIONAL = {"cos_threshold", "max_update_proj_gap", "beta1"}
NONSENSE = {"text": "5e-3", "NaN": float("nan"), "infinity": float("inf"), "None": None, "list": [0.5, 0.5, 0.5], "dict": {}}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12))


def build(method, arguments, keys):
    net = model()
    matrices = [("0.weight", net[0].weight), ("2.weight", net[2].weight)]
    rest = [("0.bias", net[0].bias), ("2.bias", net[2].bias)]
    return net, getattr(optim, method)([{"params": rest}, {"params": matrices, **keys}], **arguments)


def train(net, optimizer):
    for _ in range(4):
        net(torch.ones(8, 12)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_values_that_are_ones(method):
    train(*build(method, *METHODS[method]))


@pytest.mark.parametrize(
    "method, key, what",
    [
        (method, key, what)
        for method, parts in METHODS.items()
        for part in parts
        for key in part
        for what in NONSENSE
        if what != "None" or key not in OPTIONAL
    ],
)
def test_what_is_none_is_refused_by_name(method, key, what):
    arguments, keys = (dict(part) for part in METHODS[method])
    (arguments if key in arguments else keys)[key] = NONSENSE[what]
    with pytest.raises(ValueError, match=rf"\b{key}\b.* must be "):
        build(method, arguments, keys)


@pytest.mark.parametrize("key, value", [("lr", "1e-3"), ("betas", [0.9]), ("betas", 0.9), ("eps", None), ("weight_decay", -1.0)])
def test_a_group_is_checked_as_the_defaults_are(key, value):
    arguments, keys = METHODS["GaLoreAdamW"]
    for group in ({**keys, key: value}, {key: value}):
        with pytest.raises(ValueError, match=rf"\b{key}\b.* must be .*got "):
            optim.GaLoreAdamW([{"params": [model()[0].weight], **group}], **arguments)


@pytest.mark.parametrize(
    "key, value, want",
    [
        ("rank", np.int64(4), 4),
        ("update_proj_gap", np.int32(3), 3),
        ("scale", np.float32(0.25), 0.25),
        ("scale", torch.tensor(0.5), 0.5),
        ("lr", np.float64(0.01), 0.01),
        ("betas", [0.9, np.float64(0.99)], (0.9, 0.99)),
        ("weight_decay", np.float32(0.5), 0.5),
    ],
)
def test_numbers_of_other_libraries_become_plain(key, value, want):
    arguments, keys = (dict(part) for part in METHODS["GaLoreAdamW"])
    (arguments if key in arguments else keys)[key] = value
    net, optimizer = build("GaLoreAdamW", arguments, keys)
    got = optimizer.param_groups[1][key]
    assert got == want and type(got) is type(want)
    train(net, optimizer)


def test_a_rate_on_the_device_stays_the_tensor_it_is():
    rate = torch.tensor(1e-2)
    _, optimizer = build("GaLoreAdamW", {**ADAM, "lr": rate}, LOW_RANK)
    assert all(group["lr"] is rate for group in optimizer.param_groups)


@pytest.mark.parametrize("rank", ["8", 8.0, None, float("nan"), [8], True, 0])
def test_a_rank_that_is_none(rank):
    with pytest.raises(ValueError, match="rank must be an integer of at least 1, got "):
        optim.GaLoreAdamW(optim.param_groups(model(), rank=rank))
