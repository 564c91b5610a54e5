"""Accelerate's FSDP2, whose prepare puts sharded parameters in the optimizer's groups after it was built."""

import os

import torch
import world
from sharded import VOCAB, build, groups, states, train, weights
from torch import nn

from lowrank_sys.optim import GaLoreAdamW

STEPS = 6


def prepared(rank, size):
    """(accelerator, model, optimizer). Accelerate shards on accelerators alone, unless it is told that this is one."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import DistributedType

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    model = build()
    optimizer = GaLoreAdamW(groups(model), lr=1e-2, eps=1e-3)
    accelerator = Accelerator(cpu=True)
    for state in (PartialState(), accelerator.state):
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=100, state_dict_type="SHARDED_STATE_DICT"
    )
    return accelerator, *accelerator.prepare(model, optimizer)


def run(accelerator, model, optimizer, steps, rank, size):
    for step in steps:
        ids = torch.randint(0, VOCAB, (12, 5), generator=torch.Generator().manual_seed(step))[rank::size].flatten()
        accelerator.backward(nn.functional.cross_entropy(model(ids), ids))
        accelerator.clip_grad_norm_(model.parameters(), 1e3)
        optimizer.step()
        optimizer.zero_grad()
    return weights(model), states(optimizer.optimizer)


def on_ranks(rank, size, folder):
    accelerator, model, optimizer = prepared(rank, size)
    run(accelerator, model, optimizer, range(4), rank, size)
    accelerator.save_state(folder)
    through = run(accelerator, model, optimizer, range(4, STEPS), rank, size)
    accelerator.load_state(folder)
    again = run(accelerator, model, optimizer, range(4, STEPS), rank, size)
    return through, again, len(optimizer.optimizer.layouts)


def test_prepare_save_and_load(tmp_path):
    model = build()
    optimizer = GaLoreAdamW(groups(model), lr=1e-2, eps=1e-3)
    train(model, optimizer, range(STEPS))
    for through, again, count in world.run(2, on_ranks, 2, str(tmp_path), timeout=300):
        assert count == len(weights(model))
        torch.testing.assert_close(through, again, atol=0, rtol=0)
        torch.testing.assert_close(through[0], weights(model), atol=2e-4, rtol=2e-3)
        for i, want in states(optimizer).items():
            torch.testing.assert_close(through[1][i], want, atol=2e-4, rtol=2e-3)
