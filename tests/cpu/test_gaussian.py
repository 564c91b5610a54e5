"""A Gaussian basis from its seed: its bits, its statistics, and products with it in C++ against the oracle."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import lowrank_sys  # noqa: F401  registers the ops
from lowrank_sys import backends, reference
from lowrank_sys.reference import philox
from lowrank_sys.reference.gaussian import gaussian_basis

ops = torch.ops.lowrank
pytestmark = pytest.mark.skipif(bool(backends.NATIVE_MISSING), reason=f"no native build: {backends.NATIVE_MISSING}")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
WHICH = dict(seed=-5, step=3, parameter=7)
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])


def near(got, want, tolerance):
    error = (got.double() - want.double()).abs()
    assert got.shape == want.shape and not (error > tolerance).any(), f"off by {error.max()}, allowed {tolerance}"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(300, 70, 0), (64, 128, 64), (1, 1, 5), (130, 3, 1000), (65, 64, 2**33), (0, 4, 3)])
def test_the_bits_are_the_oracles(shape, dtype):
    d, rank, first = shape
    out = torch.full((d, rank), 7, dtype=dtype)
    ops.gaussian_basis_(out, **WHICH, first=first)
    assert torch.equal(out, gaussian_basis(d, rank, **WHICH, first=first).to(dtype))


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
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(63, 100, 7), (1, 200, 1), (200, 1, 1), (1500, 1100, 200), (0, 20, 3), (20, 0, 3)])
def test_products_against_oracle(shape, dtype, left):
    m, n, r = shape
    draw = torch.Generator().manual_seed(1)
    grad, param = torch.randn(m, n, generator=draw).to(dtype), torch.randn(m, n, generator=draw).to(dtype)
    kind = dict(**WHICH, left=left, first=37)
    depth = max(1, m if left else n)
    near(
        ops.gaussian_project(grad, rank=r, **kind),
        reference.gaussian.gaussian_project(grad.double(), rank=r, **kind),
        2.0**-22 * depth / r**0.5 if grad.numel() else 0,
    )
    x = torch.randn((r, n) if left else (m, r), generator=draw)
    want = param.double()
    ops.gaussian_back_project_(param, x, alpha=-0.5, beta=0.25, **kind)
    reference.gaussian.gaussian_back_project_(want, x.double(), alpha=-0.5, beta=0.25, **kind)
    near(param, want, ROUNDING[dtype] * (2 * want.abs().max() + 1e-4) + 1e-5 if param.numel() else 0)


def test_beta_0_does_not_read_the_weight():
    param, x = torch.full((40, 30), torch.nan), torch.randn(4, 30)
    ops.gaussian_back_project_(param, x, beta=0.0, left=True, **WHICH)
    near(param, gaussian_basis(40, 4, **WHICH) @ x, 1e-5)


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


def test_no_thread_count_changes_the_basis():
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(torch.empty(3000, 100))
        ops.gaussian_basis_(results[-1], **WHICH, first=11)
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@settings(max_examples=30, deadline=None)
@given(
    d=st.integers(1, 200),
    rank=st.integers(1, 140),
    first=st.integers(0, 2**40),
    seed=st.integers(-(2**63), 2**63 - 1),
    step=st.integers(0, 2**32 - 1),
    parameter=st.integers(0, 2**32 - 1),
)
def test_fuzz(d, rank, first, seed, step, parameter):
    which = dict(seed=seed, step=step, parameter=parameter, first=first)
    out = torch.empty(d, rank)
    ops.gaussian_basis_(out, **which)
    assert torch.equal(out, gaussian_basis(d, rank, **which))


@pytest.mark.parametrize(
    "name, args, hyper, expected",
    [
        ("gaussian_basis_", [torch.zeros(3)], {}, "gaussian_basis_: out must be a matrix (m, n), got shape (3,)"),
        ("gaussian_basis_", [torch.zeros(3, 2)], dict(first=-1), "gaussian_basis_: first must be at least 0, got -1"),
        ("gaussian_project", [torch.zeros(3, 2)], dict(rank=0, left=True), "gaussian_project: rank must be at least 1, got 0"),
        ("gaussian_project", [torch.zeros(3, 2).double()], dict(rank=1, left=True), "grad must be float32, bfloat16 or float16"),
        (
            "gaussian_back_project_",
            [torch.zeros(3, 2), torch.zeros(4, 3)],
            dict(left=True),
            "low_rank must have shape (4, 2), got (4, 3)",
        ),
        (
            "gaussian_back_project_",
            [torch.zeros(3, 2), torch.zeros(3)],
            dict(left=False),
            "low_rank must be a matrix (m, r), got shape (3,)",
        ),
        (
            "gaussian_back_project_",
            [torch.zeros(3, 2), torch.zeros(0, 2)],
            dict(left=True),
            "rank must be at least 1, got low_rank",
        ),
        (
            "gaussian_back_project_",
            [torch.zeros(3, 2), torch.zeros(4, 2).half()],
            dict(left=True),
            "low_rank must be torch.float32",
        ),
    ],
)
def test_bad_arguments(name, args, hyper, expected):
    said = []
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in args]
    for tensors in (args, fakes):
        with pytest.raises(RuntimeError) as caught:
            getattr(ops, name)(*tensors, **WHICH, **hyper)
        said.append(str(caught.value).partition("\n")[0])
    assert expected in said[0] and said[0] == said[1]


def test_opcheck():
    kind = dict(**WHICH, left=True)
    torch.library.opcheck(ops.gaussian_basis_.default, (torch.empty(8, 3),), WHICH)
    torch.library.opcheck(ops.gaussian_project.default, (torch.randn(8, 12),), kind | dict(rank=3))
    torch.library.opcheck(ops.gaussian_back_project_.default, (torch.randn(8, 12), torch.randn(3, 12)), kind)
