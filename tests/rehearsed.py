"""A rehearsed run beside the real one."""

from collections import Counter

import pytest

from lowrank_sys.nn.quant_experts import QuantExperts


def assert_rests_as_planned(fake, real, rel):
    """What stays between steps is there as planned, to `rel`, but for the state of INT8 experts that no token reached."""
    planned, made = Counter(fake.layout.pieces), Counter(real.layout.pieces)
    idle = planned - made
    assert not made - planned and all(piece.category != "weights" for piece in idle)
    assert not idle or any(isinstance(module, QuantExperts) for module in real.model.modules())
    assert fake.rest - sum(piece.bytes for piece in idle.elements()) == pytest.approx(real.rest, rel=rel)
