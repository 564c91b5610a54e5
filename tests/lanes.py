"""Which cases of a test that takes long are what a change needs; the others run with --full."""

import pytest


def usual(few, *more):
    """Values for parametrize: `few`, and `more` with --full alone. A tuple is the values of several names."""
    return [*few, *(pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.full) for v in more)]
