"""Coefficients: zero parameters of a model whose `.grad` are the low-rank gradients of its matrices."""

import torch
from torch import nn

# Name of the child module that holds the coefficients of a module's weights.
CONTAINER = "low_rank_gradients"


class Coefficient(nn.Parameter):
    """The zero parameter whose `.grad` is the low-rank gradient R of a matrix.

    A single zero, expanded: it takes no memory, and needs no gradient of autograd's.
    """

    def __new__(cls, data=None, requires_grad=False):
        made = super().__new__(cls, data, requires_grad)
        if type(made) is not cls:
            made._is_coefficient = True  # a parameter made of a fake tensor stays one
        return made

    def __reduce_ex__(self, protocol):
        return coefficient_like, (tuple(self.shape), self.dtype, self.device)


def is_coefficient(param):
    return type(param) is Coefficient or getattr(param, "_is_coefficient", False)


def zero(shape, dtype, device):
    """One zero, expanded."""
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


def coefficient_like(shape, dtype, device):
    return Coefficient(zero(shape, dtype, device))


class LowRankGradients(nn.Module):
    """The coefficients of a module's weights: parameters() yields them, state_dict() and save_pretrained() leave them out.

    A child of the module that owns the weight (a linear layer calls no children), so that clipping a part of the model
    finds them too.
    """

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        pass

    def _load_from_state_dict(self, *args):
        pass

    def extra_repr(self):
        return ", ".join(f"{name} {tuple(p.shape)}" for name, p in self._parameters.items())


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
