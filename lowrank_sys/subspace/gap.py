"""The adaptive gap of Q-GaLore (Zhang et al. 2024, section 3.3): a subspace that stays the same is looked for less often."""

import math

import torch


def new_overlaps(size, device):
    """The queue of overlaps, oldest first; NaN where there is none yet."""
    return torch.full((size,), math.nan, dtype=torch.float32, device=device)


def overlap(old, new):
    """|oldᵀ new|²/r, from r/d (chance) to 1 (the same subspace, whatever the vectors' order and signs), 0-dim fp32.

    Where Q-GaLore takes the cosine of the first vectors, which a flipped sign makes -1. An old basis from INT4 is not quite
    orthonormal: what rounding lifts above 1 counts as 1.
    """
    c = old.to(torch.float32).T @ new.to(torch.float32)
    return (c.square().sum() / old.shape[1]).clamp(max=1.0)


def push_(overlaps, value, kept):
    """Append to the queue; returns its mean, 0-dim: NaN until it is full.

    A basis that was kept because its gradient was of no use (0-dim bool) says nothing: the queue stays, the result is NaN.
    """
    queue = torch.cat([overlaps[1:], value.reshape(1)])
    overlaps.copy_(torch.where(kept, overlaps, queue))
    return torch.where(kept, math.nan, queue.mean())


def grow_(gaps, means, cos_threshold, gamma_proj, most):
    """Lengthen the gaps (0-dim int64, on the host) whose mean reaches cos_threshold: gap <- int(gap gamma_proj), up to `most`.

    Reads the means (0-dim): with a GPU, the host waits here, once for all matrices that were refreshed in this step.
    """
    for gap, mean in zip(gaps, torch.stack(means).tolist() if means else ()):
        if mean >= cos_threshold:
            gap.fill_(max(gap.item(), min(int(gap.item() * gamma_proj), most)))
