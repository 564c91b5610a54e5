"""A Gaussian basis from its seed: its bits, its statistics, and products with it in C++ against the oracle."""

import math

import pytest
import torch

import lowrank_sys  # noqa: F401  registers the ops
from lowrank_sys import backends, reference
from lowrank_sys.reference import philox
from lowrank_sys.reference.gaussian import gaussian_basis

ops = torch.ops.lowrank
pytestmark = pytest.mark.skipif(bool(backends.NATIVE_MISSING), reason=f"no native build: {backends.NATIVE_MISSING}")

WHICH = dict(seed=-5, step=3, parameter=7)
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])


def near(got, want, tolerance):
    error = (got.double() - want.double()).abs()
    assert got.shape == want.shape and not (error > tolerance).any(), f"off by {error.max()}, allowed {tolerance}"


def test_a_shard_has_its_rows_of_the_whole():
    whole = gaussian_basis(500, 33, **WHICH)
    for first, last in ((0, 500), (0, 64), (37, 41), (63, 65), (100, 500)):
        out = torch.empty(last - first, 33)
        ops.gaussian_basis_(out, **WHICH, first=first)
        assert torch.equal(out, whole[first:last])


def test_seed_refresh_and_parameter_count():
    bases = [
        gaussian_basis(64, 8, seed=s, step=t, parameter=p)
        for s, t, p in ((1, 1, 1), (2, 1, 1), (1 << 32 | 1, 1, 1), (1, 2, 1), (1, 1, 2))
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(bases) for b in bases[:i])


def test_words_are_not_those_of_stochastic_rounding():
    """The counters' second word tells them apart: element e of random16 and e of a basis never share a draw."""
    first = philox.philox([torch.tensor([c]) for c in (0, 0, 3, 7)], -5)[0]
    tagged = philox.philox([torch.tensor([c]) for c in (0, 0x80000000, 3, 7)], -5)[0]
    assert first != tagged
    want = reference.gaussian.normal_pair(tagged, philox.philox([torch.tensor([c]) for c in (0, 0x80000000, 3, 7)], -5)[1])[0]
    assert torch.equal(gaussian_basis(1, 1, **WHICH).view(1), want)


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_statistics(seed):
    """Mean, variance, skewness, kurtosis, tails and correlations within four standard errors of N(0, 1/r)."""
    d, r = 4096, 128
    x = gaussian_basis(d, r, seed=seed, step=1, parameter=9).double() * r**0.5
    n = x.numel()
    for moment, want, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**moment).mean() - want) < 4 * math.sqrt(spread / n), moment
    for bound in (1.0, 2.0, 3.0):
        share = math.erfc(bound / 2**0.5)
        assert abs((x.abs() > bound).double().mean() - share) < 4 * math.sqrt(share / n), bound
    # Neighbours in a row and in a column, and the four rows of one counter.
    for a, b in ((x[:, :-1], x[:, 1:]), (x[:-1], x[1:]), (x[:-16], x[16:]), (x[:-64], x[64:])):
        assert abs((a * b).mean()) < 4 / math.sqrt(a.numel())
        assert abs((a**2 * b**2).mean() - 1) < 4 * math.sqrt(8 / a.numel())
    # BᵀB is the identity but for 1/sqrt(d): the largest of r² / 2 correlations stays under six deviations.
    gram = x.T @ x / d - torch.eye(r)
    assert (gram * d**0.5).abs().max() < 6 * 2**0.5


@SIDES
def test_shards_add_up(left):
    """A projected axis cut in two: the parts' projections, each with its first index, sum to that of the whole."""
    grad = torch.randn(200, 150)
    whole = ops.gaussian_project(grad, rank=20, left=left, **WHICH)
    halves = grad.split(77, dim=0 if left else 1)
    parts, first = 0, 0
    for half in halves:
        parts = parts + ops.gaussian_project(half.contiguous(), rank=20, left=left, first=first, **WHICH)
        first += half.shape[0 if left else 1]
    near(parts, whole, 1e-5)
