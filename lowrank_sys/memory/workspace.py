"""Bytes that an operator allocates and frees again inside itself, where no tensor shows them."""

import torch

from lowrank_sys._ops.workspace import FORMULAS, bound

aten = torch.ops.aten


def _norm_in_another_type(tensors, dtype):
    """The CPU converts a whole tensor before it sums it."""
    return max((t.numel() * dtype.itemsize for t in tensors if dtype is not None and t.dtype != dtype), default=0)


# torch's own operators whose scratch is of a tensor's size.
TORCH = {
    aten._foreach_norm.Scalar: lambda tensors, order=2, dtype=None: _norm_in_another_type(tensors, dtype),
    aten.linalg_vector_norm.default: lambda tensor, *_, dtype=None, **__: _norm_in_another_type([tensor], dtype),
    aten._linalg_svd.default: lambda a, *_, **__: a.element_size() * a.numel(),  # LAPACK works on a copy
    aten._linalg_eigh.default: lambda a, *_, **__: 2 * a.element_size() * a.numel(),  # what LAPACK asks for
}


def op_name(func):
    """The key in _ops.SCHEMAS of one of our ops."""
    overload = "" if func._overloadname == "default" else f".{func._overloadname}"
    return func._schema.name.removeprefix("lowrank::") + overload


def scratch_bytes(func, args, kwargs, cuda=False):
    """Scratch of one call of `func`. Ours: the formula beside the op (lowrank_sys._ops.workspace); torch's: TORCH, or none."""
    if func.namespace == "lowrank":
        formula = FORMULAS.get(op_name(func))
        return bound(*args, **kwargs) if formula is None else formula(*args, **kwargs, cuda=cuda)
    if func in TORCH and not cuda:
        return TORCH[func](*args, **kwargs)
    return 0
