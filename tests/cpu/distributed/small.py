"""A small model, its optimizers, and batches of which every rank takes its own rows."""

import torch
from projected_model import VOCAB
from torch import nn
from torch.nn.parallel import DistributedDataParallel

LENGTH = 9
# Two orders of summation of the same numbers: rounding of a loss near 4, and of weights below 1 that steps of Adam, with an eps far
# above the gradients' rounding, carry on.
CLOSE = {"atol": 2e-5, "rtol": 0}


def ids_of(step, rows=4):
    return torch.randint(0, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(step))


def backward(model, ids, micro=1):
    """The loss of these rows. A DistributedDataParallel means gradients in the last of `micro` backwards."""
    total = 0
    for i, part in enumerate(ids.chunk(micro)):
        if isinstance(model, DistributedDataParallel) and i + 1 < micro:
            with model.no_sync():
                loss = model(input_ids=part, labels=part).loss / micro
                loss.backward()
        else:
            loss = model(input_ids=part, labels=part).loss / micro
            loss.backward()
        total += loss.item()
    return total


def train(model, optimizer, steps, *, rank=0, size=1, micro=1, clip=None):
    """The losses of this rank's rows: all batches are the same, whatever the size of the world."""
    losses = []
    for step in range(steps) if isinstance(steps, int) else steps:
        losses.append(backward(model, ids_of(step).chunk(size)[rank], micro))
        if clip is not None:
            nn.utils.clip_grad_norm_(optimizer_parameters(optimizer), clip)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def optimizer_parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def bases(optimizer):
    return [optimizer.state[p]["basis"].clone() for p in optimizer_parameters(optimizer) if "basis" in optimizer.state.get(p, ())]


def assert_same(ours, theirs, **close):
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], **(close or {"atol": 0, "rtol": 0}), msg=lambda m: f"{name}: {m}")
