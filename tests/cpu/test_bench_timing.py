"""The arithmetic of the figures: rounds, quantiles, spreads, and what disturbed them."""

import itertools

import pytest
import torch
from benched import CEILINGS, quick  # noqa: F401

from lowrank_sys.bench import kernels, optimizers, timing
from lowrank_sys.bench.cases import make, serving
from lowrank_sys.bench.cases.case import Case


def test_inputs_are_the_same_at_every_call():
    case = Case("galore_step", 9, 7, 3, torch.float32, False, "cpu")
    first, second = make(case), make(case)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert serving(case)[0]


def test_ratio_is_taken_round_by_round_so_that_drift_cancels():
    base = [1.0, 2.0, 4.0, 8.0, 16.0]
    ratio, noise = timing.ratio([[1.5 * t for t in base]], [base])
    assert (ratio, noise) == (1.5, False)
    assert timing.ratio([[0.9, 1.1, 1.0, 0.8, 1.2]], [[1.0] * 5]) == (1.0, True)
    assert timing.ratio([[2.0, 2.0], [2.0]], [[8.0]]) == (0.25, False)


def test_quantiles():
    assert timing.spread([[5.0, 1.0, 3.0], [2.0, 4.0]]) == pytest.approx((1.8, 3.0, 4.2, 3.0 / 1.8 - 1))
    assert timing.spread([[7.0]]) == (7.0, 7.0, 7.0, None)


def test_the_spread_covers_what_drifts_between_passes():
    assert timing.spread([[10.0] * 9, [10.0] * 9, [13.0]]) == pytest.approx((10.0, 10.0, 10.0, 0.3))
    assert timing.parts([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 3) == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    assert timing.parts([1.0, 2.0]) == [[1.0], [2.0]]


def test_interleave_runs_every_variant_once_a_round():
    calls = []
    timer = timing.Timer("cpu")
    times = timer.interleave({name: lambda name=name: calls.append(name) for name in "ab"}, seconds=0, at_least=5, warmup=1)
    assert [len(t) for t in times.values()] == [5, 5]
    assert all(set(calls[i : i + 2]) == {"a", "b"} for i in range(2, len(calls), 2))


def steal(monkeypatch, disturbed):
    """Let the host take the cores during the rounds that `disturbed`, an iterator of booleans, says."""
    clock = itertools.accumulate(itertools.chain.from_iterable((0.0, 9.0 * took) for took in disturbed))
    monkeypatch.setattr(timing._Stolen, "_seconds", lambda self: next(clock))


def test_disturbed_rounds_are_replaced(monkeypatch):
    steal(monkeypatch, itertools.cycle([False, True]))
    calls, timer = itertools.count(), timing.Timer("cpu")
    monkeypatch.setattr(timing.Timer, "_time", lambda self, prepared: prepared.run())
    times = timer.interleave({"a": lambda: next(calls)}, seconds=1e-9, at_least=2, at_most=2, warmup=0)
    assert times == {"a": [0, 1]} and not timer.quiet  # no patience is left: what there is
    steal(monkeypatch, itertools.cycle([False, True]))
    times = timer.interleave({"a": lambda: next(calls)}, seconds=60, at_least=3, at_most=3, warmup=0)
    assert times == {"a": [2, 4, 6]} and timer.quiet


@pytest.mark.parametrize(
    "quiet, passes, disturbed",
    [([True, True, True], 3, False), ([False, True, True], 2, False), ([False, True, False], 3, True), ([False], 1, True)],
)
def test_disturbed_passes_are_left_out_if_two_others_are_there(monkeypatch, quiet, passes, disturbed):
    trial = kernels.Trial(Case("project", 8, 6, 2, torch.float32, True, "cpu"))
    trial.check()
    for undisturbed in quiet:
        steal(monkeypatch, itertools.cycle([not undisturbed]))
        trial.time(timing.Timer("cpu"), seconds=0)
    served, oracle, base = trial.rows(CEILINGS)
    assert served["samples"] == base["samples"] == kernels.ROUNDS * passes
    assert [row["disturbed"] for row in (served, oracle, base)] == [disturbed] * 3
    assert (served["spread"] is None) == (served["noise"] is None) == disturbed


def test_extra_bytes_sees_a_temporary():
    big = 64 << 20
    assert timing.extra_bytes(lambda: torch.ones(big, dtype=torch.uint8).sum(), "cpu") > big * 0.9
    assert timing.extra_bytes(lambda: None, "cpu") < big * 0.1


def test_cycle_needs_a_whole_gap_and_forgives_what_happens_once():
    assert optimizers.cycle([1.0, 1.0], 3) == (None, None)
    assert optimizers.cycle([1.0, 1.0, 4.0], 3) == (2.0, 4.0)
    assert optimizers.cycle([1.0, 9.0, 4.0, 1.0, 1.0, 4.0], 3) == (2.0, 4.0)
