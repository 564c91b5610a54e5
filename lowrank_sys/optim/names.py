"""Names of an optimizer's parameters, for messages and for torch, which wants them of all groups or of none."""

import torch

from lowrank_sys.optim.coefficient import weights


def default_names(groups, count):
    """Names of `count` parameters that come after those of `groups`."""
    first = sum(len(weights(group)) for group in groups)
    return [f"parameter {first + i}" for i in range(count)]


def names_of(groups):
    """[[names of the parameters of a group]]."""
    return [group.get("param_names") or default_names(groups[:g], len(group["params"])) for g, group in enumerate(groups)]


def with_names(group, groups):
    """`group`, about to join `groups`: where either has names, whoever has none, being empty or unnamed, gets the default ones."""
    params = group["params"]
    if isinstance(params, (torch.Tensor, set)):
        return group
    params = list(params)
    named = bool(params) and all(isinstance(param, tuple) for param in params)
    if named:
        for i, other in enumerate(groups):
            other.setdefault("param_names", default_names(groups[:i], len(other["params"])))
    elif any("param_names" in other for other in groups) and not any(isinstance(param, tuple) for param in params):
        group = {**group, "param_names": default_names(groups, len(params))}
    return {**group, "params": params}


def name_of(group, g, i):
    """Of parameter i of group g."""
    return group["param_names"][i] if "param_names" in group else f"parameter {i} of group {g}"
