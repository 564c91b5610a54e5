"""DistributedDataParallel: each process reduces low-rank gradients, and all keep one basis.

torchrun --nproc-per-node 2 examples/ddp.py
"""

import os

import tiny
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lowrank_sys.nn import project_model
from lowrank_sys.optim import GaLoreAdamW, param_groups


def main(steps=20, micro_batches=2):
    model = project_model(tiny.model(), rank=16, side="right")  # before it is wrapped
    ddp = DistributedDataParallel(model)
    optimizer = GaLoreAdamW(param_groups(model, rank=16, update_proj_gap=10), lr=1e-2)
    losses = []
    for i, ids in enumerate(tiny.batches(steps * micro_batches, seed=dist.get_rank())):
        last = (i + 1) % micro_batches == 0
        ddp.require_backward_grad_sync = last  # what ddp.no_sync() does
        loss = tiny.loss_of(ddp, ids) / micro_batches
        loss.backward()
        losses.append(loss.item() * micro_batches)
        if last:
            torch.nn.utils.clip_grad_norm_(ddp.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    return losses


if __name__ == "__main__":
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.set_default_device("cuda")
    main()
    dist.destroy_process_group()
