"""ProjectedLinear: a linear layer whose backward gives R, the low-rank gradient of its weight, and never the gradient itself."""

import functools

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from lowrank_sys.nn.coefficient import CONTAINER, LowRankGradients, coefficient_like, zero
from lowrank_sys.nn.quant_weight import is_quantized, names_of

project = torch.ops.lowrank.project


class _LowRankGradient(torch.autograd.Function):
    """y as it is; its backward gives the coefficient R, and `sketch` Y = G Omega (right: Omegaᵀ G), without G = dYᵀ X.

    Both are (a B)ᵀ b for the two sides a, b of G. With the basis on the input's side a is X, so that X B (tokens, r) alone is kept;
    else a is dY, and X is kept. Omega is on the side that the basis is not on.
    """

    @staticmethod
    def forward(ctx, y, x, narrow, coefficient, sketch, omega, left, store, *basis):
        ctx.left, ctx.on_input, ctx.store, ctx.rank = left, narrow is not None, store, coefficient.shape[0 if left else 1]
        wide = _rows(x.to(y.dtype)) if narrow is None or omega is not None else None
        ctx.save_for_backward(narrow, wide, omega, *(() if ctx.on_input else basis))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        narrow, x, omega, *basis = ctx.saved_tensors
        rows = _rows(grad_out)
        r = sketch = None
        if ctx.on_input:
            r = _outer(narrow, rows)
        else:
            r = _outer(ctx.store.project_rows(rows, basis, ctx.rank), x)
        if omega is not None:
            a, b = (rows, x) if ctx.on_input else (x, rows)
            sketch = _outer(project(a, omega, left=False), b)
        if not ctx.left:
            r = r.T
        elif sketch is not None:
            sketch = sketch.T
        return grad_out, None, None, r, sketch, None, None, None, *[None] * len(ctx.needs_input_grad[8:])


def _rows(x):
    """x (..., k) as (tokens, k)."""
    return x.detach().reshape(-1, x.shape[-1]).contiguous()


def _outer(thin, wide):
    """thinᵀ wide, of (tokens, r) and (tokens, k): (r, k) fp32. In bf16 both, which GPUs multiply fast; fp16 may have no room."""
    return project(wide, thin.to(wide.dtype) if wide.dtype == torch.bfloat16 else thin, left=True)


class Shared:
    """X B of `count` layers that read one input through one basis. together: whether theirs is one now."""

    def __init__(self, count):
        self.count, self.together = count, False
        self.forget()

    def forget(self):
        """Drop what is held: the basis may have changed."""
        self._x = self._written = self._narrow = None
        self._used = 0

    def narrow(self, x, dtype, make):
        """`make()`, once for all members in a row that are given the same x."""
        if not self.together or torch.compiler.is_compiling():
            return make()
        if self._x is not x or self._written != x._version or self._narrow.dtype != dtype:
            self._x, self._written, self._narrow, self._used = x, x._version, make(), 0
        narrow, self._used = self._narrow, self._used + 1
        if self._used == self.count:
            self.forget()
        return narrow


class Projection:
    """What backward of a layer projects on, put there by the optimizer that trains the layer.

    left: whether the basis is on the left of the weight. transposed: whether the weight is (in, out). family: a name that layers
    which share one basis have in common, or None; shared: what they share (Shared), while an optimizer serves them.
    store, basis, rank: how the basis is kept (lowrank_sys.subspace.basis), its tensors, () as long as there is none, and r.
    omega: (k, l) of the sketch that backward owes the next basis, None if none is due. sketch: the leaf that gets it.
    """

    def __init__(self, left, transposed, family=None):
        self.left, self.transposed, self.family = left, transposed, family
        self.clear()

    @property
    def on_input(self):
        """Whether the basis is on the side of the layer's input."""
        return self.left == self.transposed

    def clear(self):
        self.shared = self.rank = None
        self.serve(None, ())

    @torch.no_grad()
    def narrow(self, x, dtype):
        """X B (tokens, r) where the basis is on the input's side, else None."""
        if not self.on_input:
            return None

        def make():
            return self.store.project_rows(_rows(x.to(dtype)), self.basis, self.rank).to(dtype)

        return make() if self.shared is None else self.shared.narrow(x, dtype, make)

    def serve(self, store, basis, omega=None, shape=None, receive=None):
        """Project on `basis` from now on. With an omega backward also sketches: (d, l), right (l, d), fp32, which is put into the
        `.grad` of the leaf `sketch` of this shape, of which `receive(leaf)` is told."""
        self.store, self.basis, self.omega, self.sketch = store, tuple(basis), omega, None
        self._receive = receive
        if self.shared is not None:
            self.shared.forget()
        if omega is not None:
            self.sketch = zero(shape, torch.float32, omega.device).requires_grad_(True)
            self.sketch.register_post_accumulate_grad_hook(receive)

    def to(self, device):
        if any(tensor.device != device for tensor in self.basis):
            basis = [tensor.to(device) for tensor in self.basis]
            if self.omega is None:
                self.serve(self.store, basis)
            else:
                self.serve(self.store, basis, self.omega.to(device), self.sketch.shape, self._receive)

    def __reduce_ex__(self, protocol):
        return Projection, (self.left, self.transposed, self.family)  # a copy has no optimizer


class ProjectedLinear(nn.Module):
    """What `project_model` adds to the class of a linear layer: y = x Wᵀ + b as before, and in backward R in place of G.

    W requires no gradient. The coefficient, a zero parameter of R's shape (`low_rank_gradients.weight`), gets R in its `.grad`:
    (dY B)ᵀ X with the basis B on the left, dYᵀ (X B) on the right, where the layer keeps X B (tokens, r) for backward in place of
    X (tokens, in). Clipping, accumulation and GradScaler see an ordinary gradient. The basis is the optimizer's: there is none
    before it is built, and a forward whose backward would need it is a RuntimeError.

    In a step whose end is due for another basis, backward also sketches G, at another pair of such products, and the layer keeps X.
    The optimizer announces it at the end of the step before. Differentiable once.
    """

    base = nn.Module  # the layer's class without it

    def forward(self, input):
        y = super().forward(input)
        if not torch.is_grad_enabled():
            return y
        if self.weight.requires_grad:
            raise RuntimeError(
                "the weight of a ProjectedLinear must not require a gradient, its low_rank_gradients.weight does: freeze it, "
                "or call unproject_model"
            )
        coefficient, on = self.coefficient, self.projection
        if not coefficient.requires_grad:
            return y
        if not on.basis:
            raise RuntimeError(
                "a ProjectedLinear has no basis before its optimizer is built: give param_groups(model) to an optimizer of "
                "lowrank_sys.optim with per_layer None or 'accumulate', or run under torch.no_grad()"
            )
        narrow = on.narrow(input, y.dtype)
        return _LowRankGradient.apply(y, input, narrow, coefficient, on.sketch, on.omega, on.left, on.store, *on.basis)

    @property
    def coefficient(self):
        return self.low_rank_gradients.weight

    @property
    def rank(self):
        return self.coefficient.shape[0 if self.projection.left else 1]

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.projection.to(self.weight.device)
        return self

    def extra_repr(self):
        side = "left" if self.projection.left else "right"
        return ", ".join(filter(None, (super().extra_repr(), f"rank={self.rank}, side={side}")))

    def __reduce_ex__(self, protocol):
        return _empty, (self.base,), self.__dict__.copy()


@functools.cache
def _class_of(base):
    return type(f"Projected{base.__name__}", (ProjectedLinear, base), {"base": base, "__doc__": ProjectedLinear.__doc__})


def _empty(base):
    return object.__new__(_class_of(base))


def convert(layer, rank, left, transposed, family=None):
    """Make a linear layer a ProjectedLinear, in place. transposed: its weight is (in, out). It keeps its hooks and parameters."""
    m, n = layer.weight.shape
    shape = (rank, n) if left else (m, rank)
    container = LowRankGradients()
    container.add("weight", coefficient_like(shape, torch.float32, layer.weight.device, True, True))
    layer.weight.requires_grad_(False)
    layer.weight.grad = None
    layer.add_module(CONTAINER, container)
    layer.projection = Projection(left, transposed, family)
    layer.__class__ = _class_of(type(layer))


def revert(layer):
    """The inverse of `convert`."""
    layer.weight.requires_grad_(layer.coefficient.requires_grad)
    delattr(layer, CONTAINER)
    del layer.projection
    layer.__class__ = layer.base


def ours_in_ddp(name, layer):
    """What DistributedDataParallel is to leave alone of the layer of this name: the coefficient under the name by which it would be
    broadcast into, a single zero (under its second name it is reduced as any), and an INT8 weight, which would be broadcast at
    every forward."""
    return [f"{name}.{CONTAINER}.weight", *(names_of(f"{name}.weight") if is_quantized(layer.weight) else ())]
