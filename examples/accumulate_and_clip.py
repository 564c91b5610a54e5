"""One matrix's gradient at a time, with micro-batches, clipping and a scheduler as ordinary code.

python examples/accumulate_and_clip.py
"""

import tiny
import torch

from lowrank_sys.optim import GaLoreAdamW, param_groups


def main(steps=30, micro_batches=4):
    model = tiny.model()
    groups = param_groups(model, rank=16, update_proj_gap=10)
    optimizer = GaLoreAdamW(groups, lr=1e-2, per_layer="accumulate")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for i, ids in enumerate(tiny.batches(steps * micro_batches)):
        loss = tiny.loss_of(model, ids) / micro_batches
        loss.backward()  # every matrix's gradient is projected, added up and dropped
        losses.append(loss.item() * micro_batches)
        if (i + 1) % micro_batches == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    print(f"{groups.share:.0%} of the model is low-rank; loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    return losses


if __name__ == "__main__":
    main()
