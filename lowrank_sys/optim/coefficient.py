"""The coefficients in an optimizer's groups: they are no weights, and in no checkpoint."""

from lowrank_sys.nn.coefficient import CONTAINER, is_coefficient


def weights(group):
    """The parameters of a group without their coefficients."""
    return [p for p in group["params"] if not is_coefficient(p)]


def without_coefficients(optimizer, state_dict):
    """A state_dict whose groups leave the coefficients out; the numbers of the weights stay as they are."""
    groups = []
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"]):
        count = len(weights(group))
        saved = {**saved, "params": saved["params"][:count]}
        if "param_names" in saved:
            saved["param_names"] = saved["param_names"][:count]
        groups.append(saved)
    return {**state_dict, "param_groups": groups}


def with_coefficients(optimizer, state_dict):
    """The inverse for load_state_dict, which wants as many parameters as the optimizer has."""
    groups = []
    for g, (group, saved) in enumerate(zip(optimizer.param_groups, state_dict["param_groups"])):
        count = len(weights(group))
        if len(saved["params"]) == count:
            rest = range(count, len(group["params"]))
            saved = {**saved, "params": [*saved["params"], *((CONTAINER, g, i) for i in rest)]}
        if "param_names" in saved and "param_names" in group:
            saved = {**saved, "param_names": [*saved["param_names"][:count], *group["param_names"][count:]]}
        groups.append(saved)
    return {**state_dict, "param_groups": [*groups, *state_dict["param_groups"][len(groups) :]]}
