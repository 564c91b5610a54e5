"""A small model whose weights are sharded by fully_shard, trained on other tokens on every rank, and the same in one process."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lowrank_sys.optim import param_groups

VOCAB, RANK, GAP = 32, 4, 3
SHARES = 12  # the batch of a step is this many parts, whatever the number of processes
EPS = 1e-3  # far above the rounding errors of gradients: with 1e-8 a gradient that is zero but for those moves its weight


def build(dtype=torch.float32):
    """Of the 5 rows of one matrix 4 ranks have 2, 2, 1 and none. The embedding, the head and the vectors are plain."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 12), nn.Tanh(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 12))
    model = nn.Sequential(nn.Embedding(VOCAB, 12), body)
    model.add_module("lm_head", nn.Linear(12, VOCAB))
    return model.to(dtype)


def shard(model, world, replicas=1):
    """fully_shard over all processes, or over those of each replica."""
    mesh = (
        init_device_mesh("cpu", (replicas, world // replicas), mesh_dim_names=("replicas", "shards"))
        if replicas > 1
        else init_device_mesh("cpu", (world,))
    )
    return fully_shard(model, mesh=mesh)


def groups(model, **keys):
    return param_groups(model, **{"rank": RANK, "update_proj_gap": GAP, "proj_type": "right", **keys})


def backward(model, step, parts, scale=lambda loss: loss):
    """The gradient of these parts of a step's batch, the mean of which over the ranks is that of the batch."""
    ids = torch.randint(0, VOCAB, (SHARES, 5), generator=torch.Generator().manual_seed(step))[parts].flatten()
    scale(nn.functional.cross_entropy(model(ids).float(), ids)).backward()


def train(model, optimizer, steps, rank=0, world=1, before=lambda step: None):
    mine = torch.arange(SHARES).reshape(world, -1)[rank]
    for step in steps:
        backward(model, step, mine)
        before(step)
        optimizer.step()
        optimizer.zero_grad()


def whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def weights(model):
    return {name: whole(p).detach().clone() for name, p in model.named_parameters()}


def states(optimizer):
    """The state of all weights, by number, as one process would have it."""
    return {i: {key: whole(value) for key, value in state.items()} for i, state in optimizer.state_dict()["state"].items()}
