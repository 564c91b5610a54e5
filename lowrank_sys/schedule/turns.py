"""Turns: what a schedule makes of the parameters of an optimizer, between two steps."""

import warnings

from lowrank_sys.schedule.roles import TRAINED


class Turns:
    """The roles of an optimizer's parameters.

    A frozen parameter has requires_grad False, so that no gradient of it is ever made, and no state. Whoever was frozen when the
    optimizer got it stays so.
    """

    def __init__(self, schedule):
        self.schedule = schedule
        self.begun = False  # whether there were groups to take: those of an optimizer that is built take their roles together
        self._roles = {}  # parameter -> Role
        self._able = {}  # parameter -> whether it had requires_grad

    def role(self, param):
        return self._roles.get(param, TRAINED)

    def trains(self, param):
        return self.role(param).trains

    def roles(self, groups, names):
        """{parameter: Role} for these groups, whose params may be of another optimizer than the numbers in them."""
        if self.schedule.static:
            return {}
        found = self.schedule.roles(groups, names)
        return {p: role for group, own in zip(groups, found) for p, role in zip(group["params"], own)}

    def take(self, groups, names, state):
        """Bring parameters and states (the optimizer's) in line with the groups."""
        self._roles, self.begun = self.roles(groups, names), True
        for param, role in self._roles.items():
            able = self._able.setdefault(param, param.requires_grad)
            if not role.trains:
                state.pop(param, None)
                param.grad = None
            param.requires_grad_(able and role.trains)

    def loaded(self, groups, names, state):
        """`take` after states were loaded; warns of those that are not there: some tools leave out what is frozen as they load."""
        self.take(groups, names, state)
        lacking = [
            name
            for group, own in zip(groups, names)
            for param, name in zip(group["params"], own)
            if "rank" in group and self.schedule.is_under_way(group) and param.requires_grad and not state.get(param)
        ]
        if lacking:
            some = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
            warnings.warn(f"no state was loaded for {len(lacking)} weights that train now, which begin anew: {some}", stacklevel=3)

    def advance(self, groups, names, state):
        """A step was taken."""
        schedule = self.schedule
        for group in groups:
            group["schedule_steps"] += 1
        schedule.settle(groups, state)
        before, restarts = self._roles, schedule.restarts and schedule.begins(groups)
        self.take(groups, names, state)
        for group in groups:
            for param in group["params"]:
                if self.role(param) != before[param] or restarts and "rank" in group:
                    state.pop(param, None)

    def release(self):
        """Thaw what the schedule froze."""
        for param, able in self._able.items():
            param.requires_grad_(able)
