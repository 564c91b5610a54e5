"""FRUGAL by whole layers: AdamW in those that are drawn, signSGD or SGD in the others, against the formula in fp64."""

import copy

import pytest
import torch
from torch import nn

from lowrank_sys.optim import Accumulate, FrugalBlocks, param_groups

LR, DECAY, PERIOD, STEPS = 1e-2, 0.1, 3, 11


def model():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)), nn.Embedding(4, 6))


def build(net, **options):
    groups = param_groups(net, rank=None, residual_scale=0.5)
    return FrugalBlocks(groups, LR, DECAY, active_layers=1, period=PERIOD, **options)


def give(net, step):
    generator = torch.Generator().manual_seed(step)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("rule", ["sign_sgd", "sgd"])
def test_every_step_is_the_paper_s(rule):
    net = model()
    optimizer = build(net, inactive_update_rule=rule)
    want = {name: p.detach().double() for name, p in net.named_parameters()}
    moments, drawn = {}, []
    for step in range(STEPS):
        roles = {name: optimizer.turns.role(p).name for name, p in net.named_parameters()}
        turns = {f"{i}.weight": roles[f"{i}.weight"] == "whole" for i in range(3)}
        if step % PERIOD == 0:  # moments of matrices begin anew
            drawn.append([name for name, now in turns.items() if now])
            moments = {name: held for name, held in moments.items() if name not in turns}
        give(net, step)
        for name, p in net.named_parameters():
            g, w = p.grad.double(), want[name] * (1 - LR * DECAY)
            if name in turns and not turns[name]:
                want[name] = w - LR * 0.5 * (g.sign() if rule == "sign_sgd" else g)
                continue
            t, m, v = moments.get(name, (0, 0.0, 0.0))
            t, m, v = moments[name] = t + 1, 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            want[name] = w - LR * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        optimizer.step()
        for name, p in net.named_parameters():
            torch.testing.assert_close(p.detach().double(), want[name], atol=1e-5, rtol=1e-5, msg=lambda m: f"{step} {name}: {m}")
            held = sum(value.nbytes for key, value in optimizer.state[p].items() if key.startswith("exp_avg"))
            assert held == (0 if name in turns and optimizer.turns.role(p).name != "whole" else held)
    assert all(len(names) == 1 for names in drawn) and len({names[0] for names in drawn}) > 1


def test_a_run_goes_on_to_the_bit_in_the_middle_of_a_period():
    nets = [model(), model()]
    first, second = map(build, nets)
    for step in range(STEPS):
        if step == 4:
            nets[1].load_state_dict(nets[0].state_dict())
            second.load_state_dict(copy.deepcopy(first.state_dict()))
        for net, optimizer in zip(nets[: 1 + (step >= 4)], (first, second)):
            give(net, step)
            optimizer.step()
    assert all(map(torch.equal, *(net.parameters() for net in nets)))


def test_what_it_cannot_serve_is_refused():
    net = model()
    with pytest.raises(ValueError, match="inactive_update_rule must be one of sign_sgd, sgd, got 'adam'"):
        build(net, inactive_update_rule="adam")
    with pytest.raises(ValueError, match="per_layer='accumulate' needs a rule that can start from R, got FrugalBlocks"):
        build(net, per_layer=Accumulate(model=net))
    with pytest.raises(ValueError, match="rank must be None without a subspace, got 3"):
        FrugalBlocks(param_groups(net, rank=3), LR)
