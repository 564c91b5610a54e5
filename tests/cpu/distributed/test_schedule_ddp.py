"""Layers that are drawn under DistributedDataParallel: all ranks draw the same, and take the step of the whole batch."""

import os
import sys
from pathlib import Path

import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))
STEPS, WORLD = 7, 2


def train(rank, world, file):
    from test_schedule import PERIOD, Model

    from lowrank_sys.optim import LISA, param_groups

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = wrapped = Model()
    if world > 1:
        # before the optimizer freezes anything: DDP serves what requires a gradient now
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = LISA(param_groups(model, rank=None), lr=1e-2, eps=1e-3, active_layers=2, period=PERIOD)
    drawn = []
    for step in range(STEPS):
        drawn.append([i for i, layer in enumerate(model.layers) if layer.up.weight.requires_grad])
        ids = torch.randint(0, 20, (32,), generator=torch.Generator().manual_seed(step))
        part, target = (x.chunk(world)[rank] for x in (ids, ids.roll(1)))
        nn.functional.cross_entropy(wrapped(part), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save((drawn, model.state_dict()), f"{file}-{world}-{rank}")


def process(rank, file):
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD)
    try:
        train(rank, WORLD, file)
    finally:
        distributed.destroy_process_group()


def test_all_ranks_draw_the_same_layers(tmp_path):
    file = str(tmp_path / "store")
    multiprocessing.spawn(process, (file,), nprocs=WORLD)
    train(0, 1, file)
    alone, weights = torch.load(f"{file}-1-0")
    first, second = (torch.load(f"{file}-2-{rank}") for rank in range(WORLD))
    assert alone == first[0] == second[0] and len({*map(tuple, alone)}) > 1
    for name, value in weights.items():
        assert torch.equal(first[1][name], second[1][name]), name
        torch.testing.assert_close(first[1][name], value, atol=2e-5, rtol=0, msg=lambda m: f"{name}: {m}")
