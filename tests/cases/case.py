"""A case: an op, its legal arguments and a comparison; and a call of it between guard bands."""

from collections.abc import Callable
from typing import NamedTuple

import torch

GUARD = 64


class Case(NamedTuple):
    """An op: what it may be given, and what it must then do.

    arguments: Draw -> {name in the schema: value}, legal ones.
    compare: (before, after, result) -> None, raises where the result or a written argument is wrong. before and after are the
        arguments around the call.
    lenient: why the op may accept what its fake refuses; '' if it may not.
    values: an argument whose values the op checks on the CPU, which its fake cannot: a refusal may begin with its name.
    """

    arguments: Callable
    compare: Callable
    lenient: str = ""
    values: str = ""


def tensors_of(value):
    """The tensors in an argument or a result."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [x for item in value for x in tensors_of(item)] if isinstance(value, (list, tuple)) else []


def replace(value, change):
    """`value` with every tensor in it changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    return type(value)(replace(item, change) for item in value) if isinstance(value, (list, tuple)) else value


def same_bits(a, b):
    """Equal shapes, dtypes and bytes; NaN is equal to a NaN of the same bits."""
    if a.device.type == "meta" or a.shape != b.shape or a.dtype != b.dtype:
        return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
    return torch.equal(*(t.new_empty(t.numel()).copy_(t.reshape(-1)).view(torch.uint8) for t in (a, b)))


def strided(tensor):
    """The same values with gaps between them."""
    spread = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)
    spread[..., 0] = tensor
    return spread[..., 0]


class Guarded:
    """Copies of tensors on `device`, each inside a buffer of sevens; `odd` puts them where only one element is aligned."""

    def __init__(self, odd, device="cpu"):
        self.start, self.device = GUARD + odd, device
        self.buffers = []

    def __call__(self, tensor):
        if tensor.device.type == "meta":
            return tensor
        if not tensor.is_contiguous():
            return strided(tensor)
        n = tensor.numel()
        buffer = torch.full((n + 2 * GUARD + 1,), 7, dtype=torch.float32, device=self.device).to(tensor.dtype)
        view = buffer[self.start : self.start + n].view(tensor.shape)
        view.copy_(tensor)
        self.buffers.append((buffer, n))
        return view

    def check(self):
        for buffer, n in self.buffers:
            edges = torch.cat([buffer[: self.start], buffer[self.start + n :]])
            assert same_bits(edges, torch.full_like(edges, 7)), "written outside of a tensor"


def overload(op):
    """The OpOverload of a name in `_ops.SCHEMAS`, behind which a space and the name of a case may follow."""
    name, _, form = op.split()[0].partition(".")
    return getattr(getattr(torch.ops.lowrank, name), form or "default")


def writes(op):
    """Names of the arguments that the op may write."""
    return {a.name for a in overload(op)._schema.arguments if a.alias_info is not None and a.alias_info.is_write}


def assert_unwritten(before, after, names):
    for name in names:
        for then, now in zip(tensors_of(before[name]), tensors_of(after[name])):
            assert same_bits(then, now), f"{name} was written"


def check_call(op, entry, draw, function, device="cpu"):
    """A legal call of `function`, which serves `op`: only what is marked as written is, and results are as `entry` wants."""
    odd = draw.of(0, 1)
    guarded = Guarded(odd, device)
    # Aligned alike, because a GEMM may sum in an order that depends on it.
    before = {name: replace(value, Guarded(odd)) for name, value in entry.arguments(draw).items()}
    given = {name: replace(value, guarded) for name, value in before.items()}
    result = function(**given)
    guarded.check()
    if device != "cpu":
        given, result = (
            {name: replace(value, torch.Tensor.cpu) for name, value in given.items()},
            replace(result, torch.Tensor.cpu),
        )
    assert_unwritten(before, given, before.keys() - writes(op))
    entry.compare(before, given, result)


def exactly(oracle):
    """A comparison for codes, indices and bits: results and written arguments equal the oracle's, NaN equal to NaN."""

    def compare(before, after, result):
        want = {name: replace(value, torch.clone) for name, value in before.items()}
        wanted = oracle(**want)
        for name, value in after.items():
            for got, expected in zip(tensors_of(value), tensors_of(want[name])):
                assert_equal(name, got, expected)
        for got, expected in zip(tensors_of(result), tensors_of(wanted), strict=True):
            assert_equal("result", got, expected)

    return compare


def assert_equal(name, got, want):
    shapes = [(tuple(tensor.shape), tensor.dtype) for tensor in (got, want)]
    assert shapes[0] == shapes[1], f"{name}: {shapes[0]}, not {shapes[1]}"
    same = (got == want) | ((got != got) & (want != want))
    assert same.all(), f"{name}: {int((~same).sum())} of {same.numel()} differ"
