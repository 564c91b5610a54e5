"""Clipping by a common norm, in which a gradient that is not finite neither counts nor spreads."""

import math

import torch

# Elements whose norm is taken at once on the CPU, where torch copies them in fp64 first.
PIECE = 1 << 20


def gradient_norms(grads):
    """Euclidean norm of each gradient, (len(grads),) fp64 on the device of the first: not finite only where an element is not."""
    devices, norms = _by_device(grads).values(), [None] * len(grads)
    if len(devices) == 1:
        return _norms(grads)
    for places in devices:
        for i, norm in zip(places, _norms([grads[i] for i in places]).to(grads[0].device)):
            norms[i] = norm
    return torch.stack(norms)


def _by_device(tensors):
    """{device: which of the tensors are there}."""
    places = {}
    for i, tensor in enumerate(tensors):
        places.setdefault(tensor.device, []).append(i)
    return places


def _norms(grads):
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
        factor = clip_factor(norm, max_norm)
        for device, places in _by_device(grads).items():
            torch._foreach_mul_([grads[i] for i in places], factor.to(device))
    return norm


def clip_factor(norm, max_norm):
    """What brings a gradient of this norm (0-dim) to `max_norm` or less, fp32; 1 for a smaller one."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0).to(torch.float32)
