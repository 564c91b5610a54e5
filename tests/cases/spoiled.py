"""Arguments spoiled one at a time: refused in the words of the fake, or served."""

import re

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cases.case import Guarded, assert_unwritten, overload, replace, strided, tensors_of, writes


def resized(tensor, draw):
    """`tensor` in another shape."""
    changes = [lambda t: t.reshape(-1).repeat(2), lambda t: t.reshape(1, *t.shape)]
    if tensor.dim():
        changes += [lambda t: t[:-1], lambda t: t[..., :0], lambda t: torch.cat([t, t[:1]]) if len(t) else t.new_zeros(1)]
    if tensor.dim() == 2:
        changes += [lambda t: t.T.contiguous(), lambda t: t.reshape(-1)]
    return draw.of(*changes)(tensor).contiguous()


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
