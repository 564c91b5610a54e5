"""The argument `per_layer` of the optimizers: when the gradients of the matrices are used."""

from lowrank_sys.optim.accumulate import Accumulate
from lowrank_sys.optim.gradients import AtStep
from lowrank_sys.optim.in_backward import InBackward

MODES = {"accumulate": Accumulate, "in_backward": InBackward}


def resolve(per_layer, groups):
    """The part for an argument per_layer: None, a name of MODES, an AtStep, Accumulate or InBackward. groups: of param_groups.

    Projected layers give R, which accumulates.
    """
    projected = getattr(groups, "projected", False)
    if per_layer is None and not projected:
        return AtStep()
    part = "accumulate" if per_layer is None else per_layer
    if not isinstance(part, AtStep):
        if not isinstance(part, str) or part not in MODES:
            raise ValueError(f"per_layer must be None, {', '.join(MODES)}, an Accumulate or an InBackward, got {per_layer!r}")
        part = MODES[part]()
    if projected and not part.takes_low_rank:
        raise ValueError(f"per_layer must be None, accumulate or an Accumulate for projected layers, got {per_layer!r}")
    part.know(groups)
    return part
