"""Random calls of every op: equal to the oracle within what fp32 may be off by, or refused in one clear error; never a crash,
and never a write outside of the arguments.

LOWRANK_FUZZ=N draws N new examples an op; without it the examples are the same at every run.
"""

import os

import pytest
from fuzz import FUZZ
from fuzz.harness import Draw, check_call, check_spoiled_call
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lowrank_sys import _ops

COUNT = os.environ.get("LOWRANK_FUZZ")
SETTINGS = settings(max_examples=int(COUNT or 25), derandomize=COUNT is None, deadline=None, database=None, print_blob=False,
                    suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink))


def test_every_op_is_fuzzed():
    assert FUZZ.keys() == _ops.SCHEMAS.keys()


@pytest.mark.parametrize("op", FUZZ)
@SETTINGS
@given(data=st.data())
def test_legal_calls(op, data):
    check_call(op, FUZZ[op], Draw(data.draw))


@pytest.mark.parametrize("op", FUZZ)
@SETTINGS
@given(data=st.data())
def test_spoiled_calls(op, data):
    check_spoiled_call(op, FUZZ[op], Draw(data.draw))
