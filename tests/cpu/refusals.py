"""A refused call: one clear error, the same from every implementation, and nothing written."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode


def clone(values, change=torch.clone):
    """Arguments with every tensor copied (or changed); lists and None stay what they are."""
    if isinstance(values, (list, tuple)):
        return [clone(value, change) for value in values]
    return change(values) if isinstance(values, torch.Tensor) else values


def message(call, args, hyper):
    """First line of the RuntimeError that the call raises."""
    with pytest.raises(RuntimeError) as caught:
        call(*args, **hyper)
    return str(caught.value).partition("\n")[0]


def assert_refused(call, args, hyper, expected, oracle=None, fakes=True):
    """`call` raises, naming what it got, and writes nothing; its fake says the same, and so does the oracle if it is given."""
    before = clone(args)
    said = message(call, args, hyper)
    assert expected in said
    # fp64 is the oracle's own precision
    if oracle is not None and not any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in args):
        assert message(oracle, args, hyper) == said
    for now, then in zip(args, before):
        for a, b in zip(now, then) if isinstance(now, list) else [(now, then)]:
            assert a is b is None or torch.equal(a, b)
    if fakes:
        with FakeTensorMode() as mode:
            hyper = dict(zip(hyper, clone(list(hyper.values()), mode.from_tensor)))
            assert message(call, clone(args, mode.from_tensor), hyper) == said
