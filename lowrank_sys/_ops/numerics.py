"""What every implementation in Python counts as a number, and the precision that it computes in."""

import torch

# |g| < 2^64 keeps g² finite in fp32; a larger gradient counts as not finite.
MAX_GRADIENT = 2.0**64


def accumulator(tensor):
    """dtype to compute in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def usable(gradient):
    """Elements that may enter a moment: finite, and of finite square."""
    return gradient.abs() < MAX_GRADIENT
