"""Accelerate: accumulation, clipping and DistributedDataParallel as in any of its loops.

accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py, or with no launcher at all
"""

import tiny
import torch
from accelerate import Accelerator

from lowrank_sys.nn import project_model
from lowrank_sys.optim import GaLoreAdamW, param_groups


def main(steps=20, micro_batches=2, cpu=True):
    accelerator = Accelerator(gradient_accumulation_steps=micro_batches, cpu=cpu)
    model = project_model(tiny.model(), rank=16, side="right")  # before prepare wraps it
    optimizer = GaLoreAdamW(param_groups(model, rank=16, update_proj_gap=10), lr=1e-2)
    rows = [ids for batch in tiny.batches(steps * micro_batches * accelerator.num_processes) for ids in batch]
    loader = torch.utils.data.DataLoader(rows, batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for ids in loader:
        with accelerator.accumulate(model):
            loss = tiny.loss_of(model, ids)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    accelerator.print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    return losses


if __name__ == "__main__":
    main()
