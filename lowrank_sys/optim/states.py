"""The states of an optimizer's parameters as they are before the first step."""

import torch

from lowrank_sys.optim.coefficient import weights
from lowrank_sys.subspace.matrices import count, is_batch, matrices, stacked
from lowrank_sys.subspace.rank import of_parameter

# Numbers of parameters in groups without a rank begin here, behind those of all matrices.
FIRST_PLAIN = 2**31


def state_maker(optimizer, role_of):
    """A function of (parameter, its group) that makes a state.

    role_of: a function of a parameter that gives its lowrank_sys.schedule.roles.Role.
    """
    groups, layouts, pipeline = optimizer.param_groups, optimizer.layouts, optimizer.pipeline
    plain = (p for group in groups if "rank" not in group for p in group["params"])
    index, total, place = {param: i for i, param in enumerate(plain, FIRST_PLAIN)}, 0, {}
    for i, param in ((i, p) for group in groups if "rank" in group for i, p in enumerate(weights(group))):
        index[param], place[param] = total, i
        total += count(param.shape)

    def new_state(param, group):
        role, layout = role_of(param), layouts.get(param)
        with torch.no_grad():
            rows = param if layout is None else layout.local(param)
        numbers = {} if layout is None else layout.numbers
        if "rank" not in group or not role.trains:
            return pipeline.new_state(rows, group, index[param], total, role, numbers)
        group = of_parameter(group, place[param])
        first = index[param] + (layout.first if layout is not None and layout.experts else 0)
        states = [pipeline.new_state(one, group, i, total, role, numbers) for i, one in enumerate(matrices(rows), first)]
        return stacked(states) if is_batch(param.shape) else states[0]

    return new_state
