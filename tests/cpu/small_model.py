"""A small model, trained with per_layer modes."""

import pytest
import torch
from torch import nn

from lowrank_sys.optim import Accumulate, GaLoreAdamW, InBackward, param_groups

ops = torch.ops.lowrank
VOCAB, TOKENS, GAP = 50, 128, 4
LR = 1e-2
# Adam divides by |g| + eps: with an eps far above the gradients' rounding errors (about 1e-9), those stay what they are.
# With 1e-8 an entry that is zero but for rounding would move its weight by a full step, either way.
EPS = 1e-3
# Two orders of summation of the same numbers differ by about 1e-9 in R, by lr * 1e-9 / eps in a weight a step, and by one
# rounding of the weight (below 1) itself a step: far below this over 16 steps.
CLOSE = {"atol": 1e-5, "rtol": 0}
MODES = {
    "accumulate": lambda: "accumulate",
    "bf16 accumulators": lambda: Accumulate(torch.bfloat16),
    "in_backward": lambda: "in_backward",
    "in_backward clipped": lambda: InBackward(max_norm=0.5),
}
EACH = pytest.mark.parametrize("mode", MODES)


def build(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCAB, 48), nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 48), nn.LayerNorm(48))
    model.add_module("head", nn.Linear(48, VOCAB))
    return model.to(dtype)


def groups(model, **keys):
    return param_groups(model, rank=16, **{"update_proj_gap": GAP, **keys})


def galore(model, per_layer="accumulate", nonfinite="skip", lr=LR, **keys):
    return GaLoreAdamW(groups(model, **keys), lr=lr, eps=EPS, weight_decay=0.1, per_layer=per_layer, nonfinite=nonfinite)


def tokens(step):
    return torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(step))


def loss_of(model, ids):
    return nn.functional.cross_entropy(model(ids).float(), ids)


def backward(model, step, micro=1):
    for part in tokens(step).chunk(micro):
        (loss_of(model, part) / micro).backward()


def train(model, optimizer, steps, micro=1, clip=None):
    """Returns the norms before clipping."""
    norms = []
    for step in steps:
        backward(model, step, micro)
        if clip is not None:
            norms.append(clip(model, optimizer))
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor([float(norm) for norm in norms])


def clip_by_torch(model, optimizer):
    return nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def clip_by_optimizer(model, optimizer):
    return optimizer.clip_grad_norm_(1.0)


def assert_same(a, b, **close):
    """Two models have the same weights: to the bit, or as near as `close` says."""
    theirs = b.state_dict()
    assert a.state_dict().keys() == theirs.keys()
    for name, p in a.state_dict().items():
        torch.testing.assert_close(p, theirs[name], **(close or {"atol": 0, "rtol": 0}), msg=lambda m: f"{name}: {m}")


def bases(optimizer):
    return [optimizer.state[p]["basis"].clone() for p in optimizer.param_groups[1]["params"] if "basis" in optimizer.state[p]]


def coefficients(model):
    return {name: p for name, p in model.named_parameters() if "low_rank_gradients" in name}
