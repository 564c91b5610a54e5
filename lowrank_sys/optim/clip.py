"""Clipping by a common norm, in which a gradient that is not finite neither counts nor spreads."""

import math

import torch

# Elements whose norm is taken at once on the CPU, where torch copies them in fp64 first.
PIECE = 1 << 20


def gradient_norms(grads):
    """Euclidean norm of each gradient, (len(grads),) fp64: not finite only where an element is not."""
    pieces = [grad.flatten().split(PIECE) if grad.is_cpu else (grad,) for grad in grads]
    norms = torch.stack(torch._foreach_norm([piece for parts in pieces for piece in parts], 2, dtype=torch.float64))
    counts = [len(parts) for parts in pieces]
    return norms if len(norms) == len(grads) else torch.stack([part.norm() for part in norms.split(counts)])


def scale_to_norm_(grads, norms, max_norm):
    """Scale `grads` in place so that the common norm of `norms` (k,) becomes at most `max_norm`; returns it, 0-dim.

    A norm that is not finite is left out: torch's clipping would multiply every gradient by a NaN, and the optimizer could
    no longer tell the bad elements from the good ones.
    """
    norm = torch.linalg.vector_norm(torch.where(norms.isfinite(), norms, 0.0))
    if math.isfinite(max_norm):
        torch._foreach_mul_(grads, clip_factor(norm, max_norm))
    return norm


def clip_factor(norm, max_norm):
    """What brings a gradient of this norm (0-dim) to `max_norm` or less, fp32; 1 for a smaller one."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0).to(torch.float32)
