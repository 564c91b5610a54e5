"""Random calls of an op: guarded tensors, hostile values, and arguments spoiled one at a time."""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Around vectors, tiles of 32 columns and 256 virtual lanes; small ones first, because hypothesis shrinks towards the front.
SIZES = (1, 2, 3, 0, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 129, 255, 256, 257, 300)
HOSTILE = (
    0.0,
    -0.0,
    1e-45,
    -1e-40,
    1e-30,
    -1e-20,
    1e10,
    -1.8e19,
    1e20,
    -1e30,
    1e38,
    3.4e38,
    -3.4e38,
    math.inf,
    -math.inf,
    math.nan,
)
SCALES = (1.0, 0.0, 1e-42, 1e-30, 1e-10, 1e6, 1e15, 1e38)
GUARD = 64


class Fuzz(NamedTuple):
    """How to fuzz an op.

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


class Draw:
    """Choices of hypothesis, and tensors that follow from them."""

    def __init__(self, draw):
        self._draw = draw

    def of(self, *values):
        """One of `values`; simpler ones belong first."""
        return self._draw(st.sampled_from(values))

    def integer(self, low, high):
        return self._draw(st.integers(low, high))

    def size(self, least=0, most=300):
        return self.of(*(size for size in SIZES if least <= size <= most))

    def values(self, *shape, dtype=torch.float32, hostile=True):
        """A tensor of `shape`: normal values; if hostile, times a scale, and with a few values of HOSTILE anywhere."""
        generator = torch.Generator().manual_seed(self.integer(0, 999))
        tensor = torch.randn(shape, generator=generator)
        if hostile:
            tensor = tensor * self.of(*SCALES)
            for value in self._draw(st.lists(st.sampled_from(HOSTILE), max_size=3)):
                if tensor.numel():
                    tensor.view(-1)[int(torch.randint(tensor.numel(), (), generator=generator))] = value
        return tensor.to(dtype)


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


class Guarded:
    """Copies of tensors, each inside a buffer of sevens; `odd` puts them where only one element is aligned."""

    def __init__(self, odd):
        self.start = GUARD + odd
        self.buffers = []

    def __call__(self, tensor):
        if tensor.device.type == "meta":
            return tensor
        if not tensor.is_contiguous():
            return strided(tensor)
        n = tensor.numel()
        buffer = torch.full((n + 2 * GUARD + 1,), 7, dtype=torch.float32).to(tensor.dtype)
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


def check_call(op, entry, draw, function):
    """A legal call of `function`, which serves `op`: only what is marked as written is, and results are as `entry` wants."""
    odd = draw.of(0, 1)
    guarded = Guarded(odd)
    # Aligned alike, because a GEMM may sum in an order that depends on it.
    before = {name: replace(value, Guarded(odd)) for name, value in entry.arguments(draw).items()}
    after = {name: replace(value, guarded) for name, value in before.items()}
    result = function(**after)
    guarded.check()
    assert_unwritten(before, after, before.keys() - writes(op))
    entry.compare(before, after, result)


def resized(tensor, draw):
    """`tensor` in another shape."""
    changes = [lambda t: t.reshape(-1).repeat(2), lambda t: t.reshape(1, *t.shape)]
    if tensor.dim():
        changes += [lambda t: t[:-1], lambda t: t[..., :0], lambda t: torch.cat([t, t[:1]]) if len(t) else t.new_zeros(1)]
    if tensor.dim() == 2:
        changes += [lambda t: t.T.contiguous(), lambda t: t.reshape(-1)]
    return draw.of(*changes)(tensor).contiguous()


def strided(tensor):
    """The same values with gaps between them."""
    spread = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)
    spread[..., 0] = tensor
    return spread[..., 0]


def spoiled_tensor(tensor, draw):
    """(`tensor` with a wrong dtype, shape, strides or device; whether the fakes can be asked about it)."""
    kind = draw.of("dtype", "shape", "strides", "device")
    if kind == "dtype":
        other = draw.of(torch.float64, torch.bfloat16, torch.float32, torch.int32, torch.int64, torch.uint8, torch.bool)
        return torch.zeros(tensor.shape, dtype=other)
    if kind == "device":
        return tensor.to("meta")
    return resized(tensor, draw) if kind == "shape" else strided(tensor)


# An entry of a list that had none, by the type of the list.
FILLERS = {
    "List[Tensor]": lambda: torch.zeros(2), "List[int]": lambda: 0, "List[str]": lambda: "nothing", "List[bool]": lambda: False,
    "List[float]": lambda: 0.0,
}  # fmt: skip


def spoiled_plain(value, draw):
    """Something else of a plain value's type."""
    if isinstance(value, str):
        return "nothing"
    return not value if isinstance(value, bool) else type(value)(draw.of(0, -1))


def spoiled(op, arguments, draw):
    """`arguments` with one of them changed, legal or not."""
    kinds = {a.name: str(a.type) for a in overload(op)._schema.arguments}
    able = [
        name
        for name, value in arguments.items()
        if not (value is None or isinstance(value, torch.dtype) or kinds[name] in ("bool", "float"))
    ]
    name = draw.of(*able)
    value = arguments[name]
    if isinstance(value, torch.Tensor):
        value = spoiled_tensor(value, draw)
    elif isinstance(value, list) and (not value or draw.of(False, True)):
        value = value[:-1] if draw.of(True, False) else value + (value[-1:] or [FILLERS[kinds[name]]()])
    elif isinstance(value, list):
        i = draw.integer(0, len(value) - 1)
        item = spoiled_tensor(value[i], draw) if isinstance(value[i], torch.Tensor) else spoiled_plain(value[i], draw)
        value = [*value[:i], item, *value[i + 1 :]]
    else:
        value = spoiled_plain(value, draw)
    return arguments | {name: value}


def refusal(call, arguments):
    """First line of the error that `call` raises, or None."""
    try:
        call(**arguments)
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


def check_spoiled_call(op, entry, draw):
    """One argument of a legal call changed: the op refuses it in the words of its fake and writes nothing, or serves it."""
    before = spoiled(op, entry.arguments(draw), draw)
    guarded = Guarded(0)
    after = {name: replace(value, guarded) for name, value in before.items()}
    said = refusal(overload(op), after)
    guarded.check()
    name = op.split()[0].partition(".")[0]
    assert said is None or said.startswith(f"{name}: "), said
    assert_unwritten(before, after, before if said else before.keys() - writes(op))
    if any(tensor.device.type == "meta" for value in before.values() for tensor in tensors_of(value)):
        return
    with FakeTensorMode() as mode:
        wanted = refusal(overload(op), {key: replace(value, mode.from_tensor) for key, value in before.items()})
    if wanted is None and said is not None and entry.values:
        assert re.match(rf"{name}: (matrix \d+: )?{entry.values}\[", said), said
        return
    assert said == wanted or (said is None and entry.lenient), f"said {said!r}, its fake {wanted!r}"


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
