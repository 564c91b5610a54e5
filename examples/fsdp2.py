"""FSDP2 in a loop of your own: fully_shard the model, then build the optimizer; a distributed checkpoint in the middle.

torchrun --nproc-per-node 2 examples/fsdp2.py        (or python examples/fsdp2.py, one process)
"""

import tempfile

import tiny
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from lowrank_sys.optim import GaLoreAdamW, param_groups


def build():
    model = tiny.model()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model, GaLoreAdamW(param_groups(model, rank=16, update_proj_gap=10), lr=1e-2)


def train(model, optimizer, batches):
    losses = []
    for ids in batches:
        loss = tiny.loss_of(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    return losses


def pieces(model, optimizer):
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))


def main(steps=20):
    if not dist.is_initialized():
        one = {} if dist.is_torchelastic_launched() else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("gloo", **one)
    model, optimizer = build()
    batches = list(tiny.batches(steps, seed=dist.get_rank()))  # other tokens on every rank
    losses = train(model, optimizer, batches[: steps // 2])

    with tempfile.TemporaryDirectory() as mine:
        folder = [mine]
        dist.broadcast_object_list(folder)  # the first rank's
        dcp.save(pieces(model, optimizer), checkpoint_id=folder[0])

        model, optimizer = build()  # here, or later in a job of any number of processes
        loaded = pieces(model, optimizer)
        dcp.load(loaded, checkpoint_id=folder[0])
        set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        dist.barrier()
    return losses + train(model, optimizer, batches[steps // 2 :])


if __name__ == "__main__":
    print(main())
    dist.destroy_process_group()
