"""Layers that are drawn under DistributedDataParallel: all ranks draw the same, and take the step of the whole batch."""

import torch
import world
from test_schedule import PERIOD, Model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lowrank_sys.optim import LISA, param_groups

STEPS, SIZE = 7, 2


def trained(rank, size):
    """(layers that trained in each step, weights)."""
    torch.manual_seed(0)
    model = wrapped = Model()
    if size > 1:
        # before the optimizer freezes anything: DDP serves what requires a gradient now
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = LISA(param_groups(model, rank=None), lr=1e-2, eps=1e-3, active_layers=2, period=PERIOD)
    drawn = []
    for step in range(STEPS):
        drawn.append([i for i, layer in enumerate(model.layers) if layer.up.weight.requires_grad])
        ids = torch.randint(0, 20, (32,), generator=torch.Generator().manual_seed(step))
        part, target = (x.chunk(size)[rank] for x in (ids, ids.roll(1)))
        nn.functional.cross_entropy(wrapped(part), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    return drawn, model.state_dict()


def test_all_ranks_draw_the_same_layers():
    first, second = world.run(SIZE, trained, SIZE)
    alone, weights = trained(0, 1)
    assert alone == first[0] == second[0] and len({*map(tuple, alone)}) > 1
    for name, value in weights.items():
        assert torch.equal(first[1][name], second[1][name]), name
        torch.testing.assert_close(first[1][name], value, atol=2e-5, rtol=0, msg=lambda m: f"{name}: {m}")
