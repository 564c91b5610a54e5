"""Q-GaLore: INT8 weights, INT4 bases, 8-bit moments, every matrix stepped inside backward. A resumed run is the same to the bit.

python examples/int8_in_backward.py
"""

import io

import tiny
import torch

from lowrank_sys.nn import quantize_model
from lowrank_sys.optim import QGaLoreAdamW8bit, param_groups


def trained(state, steps, skip=0):
    """(losses, state) after the batches skip ... steps - 1."""
    model = quantize_model(tiny.model(), group_size=64)
    groups = param_groups(model, rank=16, update_proj_gap=10, quant_group_size=64)
    optimizer = QGaLoreAdamW8bit(groups, lr=1e-2, per_layer="in_backward")
    if state is not None:
        saved = torch.load(io.BytesIO(state), weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    losses = []
    for ids in list(tiny.batches(steps))[skip:]:
        loss = tiny.loss_of(model, ids)
        loss.backward()
        optimizer.step()  # what is not a matrix: embeddings, norms, the head
        optimizer.zero_grad()
        losses.append(loss.item())
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    print(f"{len(losses)} steps, loss {losses[-1]:.3f}, state {optimizer.state_bytes() / 2**10:.0f} KiB")
    return losses, file.getvalue()


def main(steps=30):
    whole, _ = trained(None, steps)
    first, state = trained(None, steps // 2)
    rest, _ = trained(state, steps, skip=steps // 2)
    assert first + rest == whole
    return whole


if __name__ == "__main__":
    main()
