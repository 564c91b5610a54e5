"""What every method is shown: a matrix, its gradients, and the hyper-parameters of a short run."""

import torch

STEPS, GAP, LR, DECAY = 9, 4, 1e-2, 0.1
COMMON = {"lr": LR, "weight_decay": DECAY}
ADAM = {**COMMON, "betas": (0.9, 0.999), "eps": 1e-8}


def matrix_of(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(shape, steps=STEPS):
    """Of a few strong directions, so that a basis is one of theirs, and a slow drift."""
    generator = torch.Generator().manual_seed(1)
    u, v = torch.randn(*shape[:-1], 3, generator=generator), torch.randn(*shape[:-2], 3, shape[-1], generator=generator)
    for _ in range(steps):
        u = u + 0.2 * torch.randn(u.shape, generator=generator)
        yield u * torch.tensor([4.0, 2.0, 1.0]) @ v + 0.1 * torch.randn(shape, generator=generator)


def tensors(optimizer, matrix):
    """Every tensor of a matrix and its state but the host's schedule, which counts on."""
    state = {k: v.clone() for k, v in optimizer.state[matrix].items() if isinstance(v, torch.Tensor) and k != "countdown"}
    return {"weight": matrix.detach().clone(), **state}
