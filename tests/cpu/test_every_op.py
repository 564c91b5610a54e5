"""Every op on every kind of size, with uninitialised memory full of NaN and by several threads; its fake and its schema."""

import os
import subprocess
import sys

import pytest
import torch
from cases import CASES
from cases.case import check_call, overload, replace, same_bits, tensors_of
from cases.draw import NAMED, Simplest, named
from threads import threads

from lowrank_sys import _ops, backends

pytestmark = pytest.mark.skipif(bool(backends.NATIVE_MISSING), reason=f"no native build: {backends.NATIVE_MISSING}")
EVERY = pytest.mark.parametrize("op", CASES)


@pytest.fixture(autouse=True)
def poisoned():
    """Allocations of torch are filled with NaN, and 255 where they are whole numbers."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", [name for name in NAMED if name != "large"])
@EVERY
def test_named_sizes(op, name):
    for seed in range(4):
        check_call(op, CASES[op], named(op, name, seed), overload(op))


@pytest.mark.parametrize("count", [1, 5])
@EVERY
def test_large_matrices(op, count):
    with threads(count):
        check_call(op, CASES[op], named(op, "large", count), overload(op))


@pytest.mark.parametrize("op", [op for op in CASES if "[] steps" in _ops.SCHEMAS[op.split()[0]]])
def test_a_list_is_its_matrices_one_by_one(op):
    """To the bit, counters and what is left out included."""
    several = (CASES[op].arguments(named(op, "odd", seed)) for seed in range(100))
    steps = (drawn for drawn in several if drawn.get("found_inf") is None or not drawn["found_inf"].any())
    arguments = next(drawn for drawn in steps if len(drawn["steps"]) > 1)
    count = len(arguments["steps"])
    together, alone = ({name: replace(value, torch.clone) for name, value in arguments.items()} for _ in range(2))
    overload(op)(**together)
    for i in range(count):  # a list with several entries a matrix has all firsts, then all seconds
        overload(op)(**{name: value[i::count] if isinstance(value, list) else value for name, value in alone.items()})
    assert all(map(same_bits, tensors_of(list(together.values())), tensors_of(list(alone.values()))))


@EVERY
def test_opcheck(op):
    torch.library.opcheck(overload(op), (), CASES[op].arguments(Simplest()))


def test_who_serves():
    assert {row.implementation for row in backends.table() if row.device == "cpu"} == {"C++", "composition"}


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="MALLOC_PERTURB_ is glibc's")
def test_no_read_of_uninitialised_memory():
    """What C++ allocates of its own comes filled with 3e38, too: the same results."""
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", __file__, "-k", "named_sizes"]
    done = subprocess.run(command, env=os.environ | {"MALLOC_PERTURB_": "128"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
