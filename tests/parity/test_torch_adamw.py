"""Full rank with B = I is torch.optim.AdamW, and so is a group without a rank."""

import pytest
import torch

from lowrank_sys.optim import GaLoreAdamW, param_groups


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("low_rank", [True, False], ids=["identity basis", "no rank"])
def test_follows_torch_adamw(llama, backward, low_rank):
    ours, theirs = llama(), llama()
    hyper = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    if low_rank:
        groups = param_groups(ours, rank=192, scale=1.0)
    else:
        groups = ours.named_parameters()
    optimizer = GaLoreAdamW(groups, **hyper)
    reference = torch.optim.AdamW(theirs.parameters(), **hyper)
    for step in range(10):
        backward(theirs, step)
        # The same gradients for both, so that the comparison is of the steps alone.
        for p, q in zip(ours.parameters(), theirs.parameters()):
            p.grad = q.grad.clone()
        if step == 0 and low_rank:
            optimizer.make_states(list(ours.parameters()))
            for state in optimizer.state.values():
                if "basis" in state:
                    state["basis"].copy_(torch.eye(*state["basis"].shape))
                    state["countdown"].fill_(1000)
        optimizer.step()
        reference.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        assert relative(p, q) < 1e-6, name
