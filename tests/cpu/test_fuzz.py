"""Random calls of every op: equal to the oracle within what fp32 may be off by, or refused in one clear error; never a crash,
and never a write outside of the arguments.

LOWRANK_FUZZ=N draws N examples an op; beyond those of --full they are new at every run.
"""

import os

import pytest
from cases import CASES
from cases.case import check_call, overload
from cases.draw import Draw
from cases.spoiled import check_spoiled_call
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lowrank_sys import _ops, backends, reference

FULL = 25  # as many with --full
COUNT = int(os.environ.get("LOWRANK_FUZZ", 10))
SETTINGS = settings(
    max_examples=COUNT,
    derandomize=COUNT <= FULL,
    deadline=None,
    database=None,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
)


class Random(Draw):
    """Choices of hypothesis."""

    def __init__(self, data):
        self._data = data

    def integer(self, low, high):
        return self._data.draw(st.integers(low, high))


# Who serves an op: what a CPU user gets, and the oracle itself, which serves where nothing is built.
SERVED = {
    op: {row.implementation: overload(op) for row in backends.table() if (row.op, row.device) == (op.split()[0], "cpu")}
    | ({"reference": reference.ORACLES[op]} if op in reference.ORACLES else {})
    for op in CASES
}


def test_every_op_is_fuzzed():
    assert {op.split()[0] for op in CASES} == _ops.SCHEMAS.keys()


@pytest.mark.parametrize("op, backend", [(op, backend) for op in CASES for backend in SERVED[op]])
@SETTINGS
@given(data=st.data())
def test_legal_calls(op, backend, count, data):
    check_call(op, CASES[op], Random(data), SERVED[op][backend])
    count("op", op, backend)


@pytest.mark.parametrize("op", CASES)
@SETTINGS
@given(data=st.data())
def test_spoiled_calls(op, count, data):
    check_spoiled_call(op, CASES[op], Random(data))
    count("refused", op)
