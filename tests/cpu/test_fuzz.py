"""Random calls of every op: equal to the oracle within what fp32 may be off by, or refused in one clear error; never a crash,
and never a write outside of the arguments.

LOWRANK_FUZZ=N draws N examples an op; beyond the default they are new at every run.
"""

import os

import pytest
from fuzz import FUZZ
from fuzz.harness import Draw, check_call, check_spoiled_call, overload
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lowrank_sys import _ops, backends, reference

DEFAULT = 25
COUNT = int(os.environ.get("LOWRANK_FUZZ", DEFAULT))
SETTINGS = settings(
    max_examples=COUNT,
    derandomize=COUNT <= DEFAULT,
    deadline=None,
    database=None,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
)


# Who serves an op: what a CPU user gets, and the oracle itself, which serves where nothing is built.
SERVED = {
    op: {row.implementation: overload(op) for row in backends.table() if (row.op, row.device) == (op.split()[0], "cpu")}
    | ({"reference": reference.ORACLES[op]} if op in reference.ORACLES else {})
    for op in FUZZ
}


def test_every_op_is_fuzzed():
    assert {op.split()[0] for op in FUZZ} == _ops.SCHEMAS.keys()


@pytest.mark.parametrize("op, backend", [(op, backend) for op in FUZZ for backend in SERVED[op]])
@SETTINGS
@given(data=st.data())
def test_legal_calls(op, backend, count, data):
    check_call(op, FUZZ[op], Draw(data.draw), SERVED[op][backend])
    count("op", op, backend)


@pytest.mark.parametrize("op", FUZZ)
@SETTINGS
@given(data=st.data())
def test_spoiled_calls(op, count, data):
    check_spoiled_call(op, FUZZ[op], Draw(data.draw))
    count("refused", op)
