"""Operators on fake tensors, each worked out once: torch takes some 200 us for one of them, what is remembered a quarter."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

from lowrank_sys.memory.shapes import SHAPES
from lowrank_sys.optim.storages import storages

# (operator, what its result depends on) -> Result, or None for what has to be worked out every time.
_RESULTS: dict[tuple, Result | None] = {}


class Output(NamedTuple):
    """A tensor of a result. argument: which of the tensors given it is, or whose storage it has; None for a new one."""

    argument: int | None
    itself: bool
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    size: int  # of a new storage, in bytes


class Result(NamedTuple):
    kind: type  # of what is returned: Tensor, tuple, list or NoneType
    outputs: tuple[Output, ...]


class Unknown(Exception):
    """The result depends on more than a key holds."""


def run(func, args, kwargs):
    """(what `func` returns, the tensors in it whose storage is new)."""
    out = func(*args, **kwargs)
    given = {id(s): s for t in tensors_in((args, kwargs)) for s in storages(t)}
    return out, [t for t in tensors_in(out) if not any(id(s) in given for s in storages(t))]


class Fakes:
    """Runs operators under `mode`, those alone that return tensors, and whose result follows from sizes, types and numbers."""

    def __init__(self, mode: FakeTensorMode):
        self._mode = mode

    def __call__(self, func, args, kwargs):
        """(what `func` returns, the tensors in it whose storage is new)."""
        tensors: list[torch.Tensor] = []
        try:
            key = (func, torch.get_default_dtype(), _key(args, tensors), _key(tuple(kwargs.items()), tensors) if kwargs else ())
            known = _RESULTS.get(key, Unknown)
        except (Unknown, TypeError):  # TypeError: something that has no hash
            return run(SHAPES.get(func, func), args, kwargs)
        if known is Unknown:
            out, new = run(SHAPES.get(func, func), args, kwargs)
            _RESULTS[key] = _remembered(func, tensors, out)
            return out, new
        if known is None:
            return run(SHAPES.get(func, func), args, kwargs)
        return self._made(known, tensors)

    def _made(self, known, tensors):
        with in_kernel_invocation_manager(self._mode):
            bare = [None if o.itself else _bare(o, tensors) for o in known.outputs]
        made = [
            tensors[o.argument] if o.itself else FakeTensor(self._mode, tensor, o.device) for o, tensor in zip(known.outputs, bare)
        ]
        new = [tensor for o, tensor in zip(known.outputs, made) if o.argument is None]
        return (made[0] if known.kind is torch.Tensor else None if known.kind is type(None) else known.kind(made)), new


def _bare(o, tensors):
    """The meta tensor inside an output."""
    if o.argument is None:
        return torch.empty_strided(o.shape, o.stride, dtype=o.dtype, device="meta")
    return torch.empty(0, dtype=o.dtype, device="meta").set_(tensors[o.argument].untyped_storage(), o.offset, o.shape, o.stride)


def _key(value, tensors):
    """What a result depends on in an argument; its tensors are appended to `tensors`."""
    kind = type(value)
    if kind is tuple or kind is list:
        return tuple([_key(part, tensors) for part in value])
    if isinstance(value, torch.Tensor):
        if not isinstance(value, FakeTensor) or value.constant is not None:
            raise Unknown
        tensors.append(value)
        return value.dtype, value.shape, value.stride(), value.storage_offset(), value.fake_device
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, torch.Generator)):
        raise Unknown
    return value if kind is int else (kind, value)


def _remembered(func, tensors, out):
    """The Result for what `func` returned, None where it is not to be remembered."""
    if torch.Tag.inplace_view in func.tags:
        return None
    outs = [out] if isinstance(out, torch.Tensor) else [] if out is None else out
    kind = torch.Tensor if isinstance(out, torch.Tensor) else type(out)
    if kind not in (torch.Tensor, tuple, list, type(None)) or not all(isinstance(t, FakeTensor) for t in outs):
        return None
    given = {id(t.untyped_storage()): i for i, t in reversed(list(enumerate(tensors)))}
    same = {id(t): i for i, t in reversed(list(enumerate(tensors)))}
    outputs, made = [], set()
    for t in outs:
        storage = t.untyped_storage()
        plain = t.layout is torch.strided and not (t.is_conj() or t.is_neg() or t.is_quantized)
        if not plain or t.constant is not None or id(storage) in made:
            return None
        argument, itself = given.get(id(storage)), id(t) in same
        if argument is None:
            made.add(id(storage))
            if t.storage_offset():
                return None
        place = same[id(t)] if itself else argument
        shape, stride, offset = tuple(t.shape), t.stride(), t.storage_offset()
        outputs.append(Output(place, itself, shape, stride, offset, t.dtype, t.fake_device, storage.nbytes()))
        if argument is None and storage.nbytes() != _bytes(outputs[-1]):
            return None
    return Result(kind, tuple(outputs))


def _bytes(o):
    """Of the storage that empty_strided makes."""
    return 0 if 0 in o.shape else o.dtype.itemsize * (1 + sum((n - 1) * s for n, s in zip(o.shape, o.stride)))


def tensors_in(tree):
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        return []
    return [t for part in tree for t in tensors_in(part)]
