"""One step of the refresh schedule, as an optimizer asks for it."""

import torch

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}


def advance(kind, gradients, states, *, left, lr=0.1, sketched=False, **group):
    """kind: of lowrank_sys.subspace. states: written in place. group: keys that differ from the kind's defaults."""
    moments = {name: signed for name, signed in MOMENTS.items() if states and name in states[0]}
    group = {"betas": (0.9, 0.999), **kind.defaults, **group}
    kind.advance(group, gradients, [s | {"left": left} for s in states], torch.tensor(lr), left, moments, sketched=sketched)
