"""The argument `per_layer` of the optimizers: when the gradients of the matrices are used."""

from lowrank_sys.optim.accumulate import Accumulate
from lowrank_sys.optim.gradients import AtStep, Hooked
from lowrank_sys.optim.in_backward import InBackward

MODES = {"accumulate": Accumulate, "in_backward": InBackward}


def resolve(per_layer, groups):
    """The part for an argument per_layer: None, a name of MODES, or an Accumulate or InBackward. groups: of param_groups."""
    if per_layer is None:
        return AtStep()
    part = per_layer
    if not isinstance(part, Hooked):
        if not isinstance(part, str) or part not in MODES:
            raise ValueError(f"per_layer must be None, {', '.join(MODES)}, an Accumulate or an InBackward, got {per_layer!r}")
        part = MODES[part]()
    part.know(groups)
    return part
