"""A step does not depend on global switches: autocast, the default dtype, the default device."""

import contextlib

import pytest
import torch
from torch import nn

from lowrank_sys import optim, reference

METHODS = {
    "galore": lambda net: optim.GaLoreAdamW(optim.param_groups(net, rank=4, update_proj_gap=3, moments="rotate"), lr=1e-2),
    "svd": lambda net: optim.GaLoreAdamW(optim.param_groups(net, rank=4, update_proj_gap=3, subspace="svd"), lr=1e-2),
    "next": lambda net: optim.GaLoreAdamW(optim.param_groups(net, rank=4, update_proj_gap=3, refresh="next"), lr=1e-2),
    "q-galore": lambda net: optim.QGaLoreAdamW8bit(
        optim.param_groups(net, rank=4, update_proj_gap=3, quant_group_size=32), lr=1e-2, min_8bit_size=0
    ),
    "adafactor": lambda net: optim.GaLoreAdafactor(optim.param_groups(net, rank=4, update_proj_gap=3)),
    "apollo": lambda net: optim.APOLLOAdamW(optim.param_groups(net, rank=4, update_proj_gap=3), lr=1e-2),
    "fira": lambda net: optim.FiraAdamW(optim.param_groups(net, rank=4, update_proj_gap=3), lr=1e-2),
    "grass": lambda net: optim.GrassAdamW(optim.param_groups(net, rank=4, update_proj_gap=3, subspace="sample"), lr=1e-2),
}


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SWITCHES = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default dtype fp64": lambda: default_dtype(torch.float64),
    "default dtype bf16": lambda: default_dtype(torch.bfloat16),
    "default device meta": lambda: torch.device("meta"),
    "inference mode off": lambda: torch.inference_mode(False),
}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24))


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_the_same_to_the_bit(method, switch):
    nets = model(), model()
    optimizers = [METHODS[method](net) for net in nets]
    for step in range(8):
        grads = [torch.randn(p.shape, generator=torch.Generator().manual_seed(step)) for p in nets[0].parameters()]
        for i, (net, optimizer) in enumerate(zip(nets, optimizers)):
            for p, g in zip(net.parameters(), grads):
                p.grad = g.clone()
            with SWITCHES[switch]() if i else contextlib.nullcontext():
                optimizer.step()
    for a, b in zip(*(net.parameters() for net in nets)):
        assert torch.equal(a, b)
        for key, value in optimizers[0].state[a].items():
            other = optimizers[1].state[b][key]
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(other, value, rtol=0, atol=0, equal_nan=True, msg=key)


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_clipped_norm_is_the_same(switch):
    nets, norms = (model(), model()), []
    for i, net in enumerate(nets):
        optimizer = optim.GaLoreAdamW(optim.param_groups(net, rank=4, refresh="next"), lr=1e-2, per_layer="accumulate")
        net(torch.ones(8, 24)).square().mean().backward()
        with SWITCHES[switch]() if i else contextlib.nullcontext():
            norms.append(optimizer.clip_grad_norm_(1e-3))
            optimizer.step()
    assert torch.equal(*norms)
    assert all(torch.equal(a, b) for a, b in zip(*(net.parameters() for net in nets)))


@pytest.mark.parametrize(
    "call",
    [
        lambda g: torch.ops.lowrank.subspace_iteration(g, None, rank=8, left=True),
        lambda g: torch.ops.lowrank.newton_schulz(g),
        lambda g: (torch.ops.lowrank.row_norms(g, left=True),),
        lambda g: torch.ops.lowrank.quantize_blockwise(g, signed=True),
        lambda g: reference.quantize_int8(g),
    ],
    ids=["subspace_iteration", "newton_schulz", "row_norms", "quantize_blockwise", "quantize_int8"],
)
def test_ops_inside_autocast(call):
    g = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    wanted = call(g)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = call(g)
    for a, b in zip(wanted if isinstance(wanted, tuple) else (wanted,), found if isinstance(found, tuple) else (found,)):
        assert a.dtype == b.dtype and torch.equal(a, b)
