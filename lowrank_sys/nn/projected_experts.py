"""Experts stacked in one parameter (E, out, in), as transformers keeps them: each a ProjectedLinear on its part of the stack."""

import functools
import inspect
import re

import torch
from torch import nn

from lowrank_sys.nn.projected_linear import ProjectedLinear, convert
from lowrank_sys.nn.unused import expect_unused_found

# Name of the child module that holds the layers of a module's stacks.
LAYERS = "low_rank_experts"


class ExpertLinear(nn.Linear):
    """One expert's layer. Its weight is a view of the stack, which is what state_dict() has and what a device move moves."""

    def __init__(self, weight):
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight)

    def _apply(self, fn, recurse=True):
        weight = self._parameters.pop("weight")
        try:
            return super()._apply(fn, recurse)
        finally:
            self._parameters["weight"] = weight

    def link(self, weight):
        """Stand for this part of a stack from now on."""
        if torch._has_compatible_shallow_copy_type(self.weight, weight):
            self.weight.data = weight
        else:
            self.weight = nn.Parameter(weight, requires_grad=False)
        self.projection.to(weight.device)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        pass

    def _load_from_state_dict(self, *args):
        pass


class ProjectedExperts(nn.Module):
    """What `project_model` adds to the class of a module of experts: in backward each expert gives R in place of G.

    A stack is no parameter any more but a buffer of the same name; its matrices are frozen parameters of ProjectedLinear layers in
    `low_rank_experts`, with a coefficient each. Where a gradient may be asked for, the module runs its own loop over the experts
    that have tokens, with their layers in the place of the matrices; else, whatever implementation it is set to.
    """

    base = nn.Module  # the module's class without it
    skips_experts = True
    _looping = False

    def forward(self, *args, **kwargs):
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        expect_unused_found(self)
        self._link()
        self._looping = True
        try:
            return inspect.unwrap(self.base.forward)(self, *args, **kwargs)
        finally:
            self._looping = False

    def __getattr__(self, name):
        found = super().__getattr__(name)
        if not self._looping or name == LAYERS or name not in self.low_rank_experts:
            return found
        return _Stack(name, self.low_rank_experts[name])

    def _link(self):
        """Let the layers stand for the stacks that are there now."""
        for name, layers in self.low_rank_experts.items():
            stack = self._buffers[name]
            if layers[0].weight.data_ptr() != stack.data_ptr() or layers[0].weight.device != stack.device:
                for layer, weight in zip(layers, stack.unbind(), strict=True):
                    layer.link(weight)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._link()
        return self

    def __reduce_ex__(self, protocol):
        return _empty, (self.base,), self.__dict__.copy()


class _Stack:
    """Stands for a stack in the loop over the experts."""

    def __init__(self, name, layers):
        self._name, self._layers = name, layers

    def __getitem__(self, expert):
        return _Matrix(self._name, self._layers[int(expert)])


class _Matrix:
    """Stands for an expert's matrix W: linear(x, W) is its layer's forward."""

    def __init__(self, name, layer):
        self._name, self._layer = name, layer

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            return _linear(*args, **(kwargs or {}))
        name = next(arg._name for arg in args if isinstance(arg, cls))
        raise NotImplementedError(
            f"{name} of projected experts can be in linear(x, {name}[expert]) alone, got {getattr(func, '__name__', func)}: leave "
            "it out by target_modules"
        )


def _linear(input, weight, bias=None):
    y = weight._layer(input)
    return y if bias is None else y + bias


@functools.cache
def _class_of(base):
    return type(f"Projected{base.__name__}", (ProjectedExperts, base), {"base": base, "__doc__": ProjectedExperts.__doc__})


def _empty(base):
    return object.__new__(_class_of(base))


def why_not(module, name):
    """Why the stack `name` of a module cannot be projected; '' if it can."""
    if getattr(module, "is_transposed", True):
        return "be (experts, out, in) in a module that transformers' use_experts_implementation knows"
    try:
        source = inspect.getsource(inspect.unwrap(type(module).forward))
    except (OSError, TypeError):
        return "be of a module with source"
    read = len(re.findall(rf"\bself\.{name}\b", source))
    if read == 0 or read != len(re.findall(rf"\blinear\([^()]*\bself\.{name}\[\w+\]", source)):
        return f"be read as linear(x, {name}[expert]) by its module"
    return ""


def convert_experts(module, stacks):
    """Make a module of experts a ProjectedExperts, in place. stacks: {name of a stack: (rank, left)}."""
    holder = nn.ModuleDict()
    for name, (rank, left) in stacks.items():
        stack = module._parameters.pop(name).detach()
        module._buffers[name] = stack
        layers = [ExpertLinear(weight) for weight in stack.unbind()]
        for layer in layers:
            convert(layer, rank, left, transposed=False)
        holder[name] = nn.ModuleList(layers)
    module.add_module(LAYERS, holder)
    module.__class__ = _class_of(type(module))


def revert_experts(model):
    """The inverse of `convert_experts`, of all modules of a model."""
    for module in [module for module in model.modules() if isinstance(module, ProjectedExperts)]:
        for name, layers in module.low_rank_experts.items():
            trained = any(layer.coefficient.requires_grad for layer in layers)
            module.register_parameter(name, nn.Parameter(module._buffers.pop(name), requires_grad=trained))
        delattr(module, LAYERS)
        module.__class__ = module.base


def names_of_stacks(model):
    """The names of the buffers that hold projected stacks."""
    return [f"{path}.{name}" for path, m in model.named_modules() if isinstance(m, ProjectedExperts) for name in m.low_rank_experts]


def projected_layers(module):
    """[(name below the module, layer)] of its experts."""
    return [(name, layer) for name, layer in module.named_modules() if isinstance(layer, ProjectedLinear)]
