"""Matrices that stop for good once their gradient has become small (GradES)."""

import torch

from lowrank_sys.schedule.roles import FROZEN, TRAINED
from lowrank_sys.schedule.schedule import Schedule


class Settling(Schedule):
    """A matrix in a group with a rank is frozen from the step on in which the sum of |G|'s entries is below `tau`.

    Looked at in every `period`-th step, after `grace` steps. A group remembers the places of its frozen parameters in `settled`.
    A weight of several matrices stops when all of them have settled. State of a matrix: `calm`, bool, of the last look.
    """

    static = False
    categories = {"calm": "counters"}

    def __init__(self, *, tau=1.0, grace=100, period=10):
        self.defaults = {"tau": tau, "grace": grace, "period": period}
        self.memory = {"schedule_steps": 0, "settled": ()}

    def roles(self, groups, names):
        return [[FROZEN if i in group["settled"] else TRAINED for i in range(len(own))] for group, own in zip(groups, names)]

    def is_under_way(self, group):
        return group["schedule_steps"] > 0

    def init(self, state, param):
        state["calm"] = torch.zeros((), dtype=torch.bool, device=param.device)

    def watch(self, gradient, state, scale, group):
        if (group["schedule_steps"] + 1) % group["period"] == 0:
            size = torch.linalg.vector_norm(gradient, 1, dtype=torch.float32)
            state["calm"].copy_((size if scale is None else size * scale) < group["tau"])

    def settle(self, groups, state):
        for group in groups:
            steps = group["schedule_steps"]
            if "rank" in group and steps % group["period"] == 0 and steps > group["grace"]:
                own = [(i, state[p]["calm"]) for i, p in enumerate(group["params"]) if "calm" in state.get(p, ())]
                group["settled"] = (*group["settled"], *(i for i, calm in own if bool(calm.all())))
