"""What all processes that train the same parameters must have in common."""

import torch

from lowrank_sys.optim.coefficient import weights
from lowrank_sys.optim.hyper import plain
from lowrank_sys.optim.names import name_of

HINT = (
    "Processes that train other parameters are a group of their own: per_layer=AtStep(process_group=...), or an Accumulate with one"
)


def configuration(optimizer):
    """{what: its value} of an optimizer: versions, method, all keys of its groups, and its parameters."""
    found = {"torch": torch.__version__, "method": type(optimizer).__name__, "nonfinite": optimizer.nonfinite}
    found["per_layer"] = optimizer.gradients.describe()
    found["number of groups"] = len(optimizer.param_groups)
    for g, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if key not in ("params", "param_names"):
                found[f"{key} of group {g}"] = plain(value)
        for i, param in enumerate(weights(group)):
            found[f"shape of {name_of(group, g, i)}"] = (*param.shape, param.dtype)
    return found


def expect_same(optimizer):
    """Raise a RuntimeError on all ranks that says in what the optimizers of the ranks differ, and which ranks stand apart."""
    optimizer.gradients.world.expect_same(configuration(optimizer), HINT)
