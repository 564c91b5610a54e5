"""A Gaussian basis in memory, where one is wanted: the steps and products make it themselves."""

import torch


def gaussian_basis(*, d, rank, seed, step, parameter, first=0, dtype=torch.float32, device="cpu"):
    """Rows first ... first + d - 1 of the basis (d, rank) of N(0, 1/rank) that `gaussian_project` uses (Flora, APOLLO).

    step counts refreshes; dtype is fp32 | bf16 | fp16, rounded to nearest even.
    """
    out = torch.empty(d, rank, dtype=dtype, device=device)
    torch.ops.lowrank.gaussian_basis_(out, seed=seed, step=step, parameter=parameter, first=first)
    return out
