"""per_layer on the device: the same steps as on whole gradients, one dense gradient in memory, and nothing waits."""

import pytest
import torch
from torch import nn

from lowrank_sys.optim import GaLoreAdamW, param_groups

WIDTH, LAYERS = 256, 6


def build():
    torch.manual_seed(0)
    layers = [m for _ in range(LAYERS) for m in (nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh())]
    model = nn.Sequential(*layers)
    model.add_module("head", nn.Linear(WIDTH, 10))
    return model.cuda()


def made(model, per_layer, gap=5, **keys):
    # eps far above the rounding errors of the gradients, which Adam would otherwise turn into whole steps
    groups = param_groups(model, rank=16, update_proj_gap=gap, **keys)
    return GaLoreAdamW(groups, lr=1e-2, eps=1e-3, per_layer=per_layer)


def backward(model, step, micro):
    x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(step)).cuda()
    for part in x.chunk(micro):
        (model(part).square().mean() / micro).backward()


def train(model, optimizer, steps, micro=1):
    for step in steps:
        backward(model, step, micro)
        nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        optimizer.step()
        optimizer.zero_grad()


def test_micro_batches_are_one_batch_of_whole_gradients():
    dense, model = build(), build()
    train(dense, made(dense, None, refresh="next"), range(12))
    train(model, made(model, "accumulate"), range(12), 4)
    for p, q in zip(dense.state_dict().values(), model.state_dict().values()):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=0)


def test_in_backward_is_the_ordinary_step():
    dense, model = build(), build()
    train(dense, made(dense, None), range(12))
    train(model, made(model, "in_backward"), range(12))
    for p, q in zip(dense.state_dict().values(), model.state_dict().values()):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=0)


@pytest.mark.parametrize("per_layer", ["accumulate", "in_backward"])
def test_memory_and_synchronisation(per_layer):
    peaks = {}
    for mode in (None, per_layer):
        model = build()
        optimizer = made(model, mode, gap=1000, refresh="next")
        train(model, optimizer, range(5))
        x = torch.randn(8, WIDTH, device="cuda")  # activations, freed on the way, are small beside the gradients
        loss = model(x).square().mean()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss.backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        peaks[mode] = torch.cuda.max_memory_allocated() - before
    # Six gradients, against one and six of a sixteenth of the size with their temporaries.
    assert peaks[None] > 0.8 * LAYERS * 4 * WIDTH**2 > 1.5 * peaks[per_layer]
