"""Coefficients: zero parameters of a model whose `.grad` are the low-rank gradients of its matrices."""

import torch
from torch import nn

from lowrank_sys.nn.quant_weight import writes, zero

# Name of the child module that holds the coefficients of a module's weights.
CONTAINER = "low_rank_gradients"


class Coefficient(nn.Parameter):
    """The zero parameter whose `.grad` is the low-rank gradient R of a matrix.

    A single zero, expanded: it takes no memory. It stays zero: whatever goes over all parameters (an average of weights, an
    initialisation) may write into it or a view of it, which does nothing. Where a hook makes R it never requires a gradient;
    with `by_autograd` (ProjectedLinear) requires_grad_ freezes and unfreezes it as any.
    """

    by_autograd = False

    def __new__(cls, data=None, requires_grad=False):
        made = super().__new__(cls, data, requires_grad)
        if type(made) is not cls:
            made._is_coefficient = True  # a parameter made of a fake tensor stays one
        return made

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        into = (*args, *kwargs.values())[0]
        if writes(func) and is_coefficient(into) and not (into.by_autograd and func is torch.Tensor.requires_grad_):
            return into
        if writes(func) and isinstance(into, (list, tuple)):  # torch._foreach_*: lists of one length
            kept = [i for i, tensor in enumerate(into) if not is_coefficient(tensor)]
            args = [[arg[i] for i in kept] if isinstance(arg, (list, tuple)) and len(arg) == len(into) else arg for arg in args]
            if len(kept) < len(into):
                return func(*args, **kwargs) if kept else None
        with torch._C.DisableTorchFunctionSubclass():
            made = func(*args, **kwargs)
            if type(made) is torch.Tensor and any(is_coefficient(arg) and _is_view(made, arg) for arg in args):
                made = made.as_subclass(cls)
        return made

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            memo[id(self)] = coefficient_like(self.shape, self.dtype, self.device, self.by_autograd, self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return coefficient_like, (tuple(self.shape), self.dtype, self.device, self.by_autograd, self.requires_grad)


def is_coefficient(param):
    return type(param) is Coefficient or getattr(param, "_is_coefficient", False)


def _is_view(made, of):
    return made.layout == torch.strided and made.untyped_storage()._cdata == of.untyped_storage()._cdata


def coefficient_like(shape, dtype, device, by_autograd=False, requires_grad=False):
    made = Coefficient(zero(shape, dtype, device), requires_grad)
    made.by_autograd = by_autograd
    return made


class LowRankGradients(nn.Module):
    """The coefficients of a module's weights: parameters() yields them, state_dict() and save_pretrained() leave them out.

    A child of the module that owns the weight (a linear layer calls no children), so that clipping a part of the model
    finds them too. Each is in a second module as well: torch.distributed.checkpoint asks a state for all parameters of a group
    but those that are shared.
    """

    def __init__(self, *, shared=True):
        super().__init__()
        if shared:
            self.shared = LowRankGradients(shared=False)

    def add(self, name, coefficient):
        for holder in (self, self.shared):
            holder.register_parameter(name, coefficient)

    def remove(self, coefficient):
        for holder in (self, self.shared):
            for name in [name for name, p in holder._parameters.items() if p is coefficient]:
                delattr(holder, name)

    def _apply(self, fn, recurse=True):
        """Follow a model that is moved: coefficients keep their type, and take no memory on the new device either."""
        for name, coefficient in list(self._parameters.items()):
            device = fn(torch.zeros((), dtype=coefficient.dtype, device=coefficient.device)).device
            moved = zero(coefficient.shape, coefficient.dtype, device)
            if coefficient.device == device:
                continue
            if torch._has_compatible_shallow_copy_type(coefficient, moved):  # the same parameter where torch can
                grad, coefficient.grad = coefficient.grad, None
                coefficient.data = moved
                coefficient.grad = None if grad is None else grad.to(device)
            else:
                self.add(
                    name, coefficient_like(moved.shape, moved.dtype, device, coefficient.by_autograd, coefficient.requires_grad)
                )
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        pass

    def _load_from_state_dict(self, *args):
        pass

    def extra_repr(self):
        return ", ".join(f"{name} {tuple(p.shape)}" for name, p in self._parameters.items())


class CoefficientsLast:
    """A module's named_modules() with those that hold coefficients at the end.

    So that the weights keep their places in parameters(), by which torch's AveragedModel pairs a model with its average,
    which may be older than the coefficients.
    """

    def __init__(self, module):
        self.module = module

    def __call__(self, *args, **kwargs):
        found = type(self.module).named_modules(self.module, *args, **kwargs)
        yield from sorted(found, key=lambda named: isinstance(named[1], LowRankGradients))


def put_last(model, path):
    """For the coefficients of the module at `path`, in the model and all that lies on the way."""
    names = path.split(".")
    for i in range(len(names)):
        module = model.get_submodule(".".join(names[:i]))
        module.named_modules = CoefficientsLast(module)


def restore_order(model):
    """Give the modules without coefficients their own named_modules()."""
    for module in list(model.modules()):
        ours = isinstance(module.named_modules, CoefficientsLast)
        if ours and not any(isinstance(m, LowRankGradients) for m in module.modules()):
            del module.named_modules


def leave_to_us(model, names):
    """Have DistributedDataParallel of this model neither broadcast nor reduce the parameters and buffers of these names."""
    ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    model._ddp_params_and_buffers_to_ignore = list(dict.fromkeys((*ignored, *names)))


def give_back(model, names):
    """The inverse."""
    ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    model._ddp_params_and_buffers_to_ignore = [name for name in ignored if name not in names]
