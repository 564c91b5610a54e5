"""select_rows: the rows of structured sparse gradients, by size or drawn, as the oracle and as the papers say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threads import threads

import lowrank_sys  # noqa: F401  registers the ops
from lowrank_sys.reference import selection

ops = torch.ops.lowrank
METHODS = ("top", "sample", "sample_replace")


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def norms_of(kind, d, seed=0):
    norms = torch.rand(d, generator=draw(seed))
    if kind == "ties":
        norms = (norms * 4).round()
    elif kind == "zeros":
        norms[norms < 0.8] = 0
    elif kind == "hostile":
        hostile = torch.tensor([torch.nan, torch.inf, -torch.inf, -1.0, -0.0, 1e-45, 3e38, 1e-38])
        norms[torch.arange(d) % 3 == 1] = hostile[torch.arange(d) % len(hostile)][torch.arange(d) % 3 == 1]
    elif kind == "none":
        norms.fill_(0)
    elif kind == "spread":
        norms = torch.logspace(-40, 38, d)[torch.randperm(d, generator=draw(seed))]
    return norms


def assert_valid(indices, scale, d, r):
    assert indices.dtype == torch.int32 and indices.shape == (r,) and scale.dtype == torch.float32 and scale.shape == (r,)
    assert (indices[1:] > indices[:-1]).all() and 0 <= indices[0] and indices[-1] < d


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["plain", "ties", "zeros", "hostile", "none", "spread"])
@pytest.mark.parametrize("d, r", [(1, 1), (7, 7), (100, 1), (1000, 300), (11008, 64)])
def test_selection_is_the_oracles(method, kind, d, r):
    norms = norms_of(kind, d, seed=r)
    for seed, step, parameter in ((0, 0, 0), (-1, 2**40, 3), (2**62 + 5, 7, 2**33)):
        stream = dict(seed=seed, step=step, parameter=parameter)
        indices, scale = ops.select_rows(norms, r=r, method=method, **stream)
        want, want_scale = selection.select_rows(norms, r=r, method=method, **stream)
        assert_valid(indices, scale, d, r)
        assert torch.equal(indices, want)
        torch.testing.assert_close(scale, want_scale, rtol=3e-7, atol=0)  # expm1 and a root in fp64, rounded once


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32), min_size=1, max_size=40), st.data(), st.sampled_from(METHODS), st.integers(-(2**63), 2**63 - 1)
)
def test_any_norms(values, data, method, seed):
    norms = torch.tensor(values, dtype=torch.float32)
    r = data.draw(st.integers(1, len(values)))
    indices, scale = ops.select_rows(norms, r=r, method=method, seed=seed, step=1, parameter=2)
    want, want_scale = selection.select_rows(norms, r=r, method=method, seed=seed, step=1, parameter=2)
    assert_valid(indices, scale, len(values), r)
    assert torch.equal(indices, want) and not scale.isnan().any()
    torch.testing.assert_close(scale, want_scale, rtol=3e-7, atol=0)
    # Rows that can be drawn come before rows of norm 0.
    positive = (norms > 0) & norms.isfinite()
    if method != "sample_replace":
        assert positive[indices.long()].sum() == min(r, positive.sum())


def test_top_is_the_largest_lower_index_first():
    norms = torch.tensor([1.0, 3.0, 2.0, 3.0, torch.nan, 3.0, torch.inf, 2.0])
    for r, want in ((2, [1, 3]), (3, [1, 3, 5]), (4, [1, 2, 3, 5]), (6, [0, 1, 2, 3, 5, 7]), (7, [0, 1, 2, 3, 4, 5, 7])):
        indices, scale = ops.select_rows(norms, r=r, method="top")
        assert indices.tolist() == want and (scale == 1).all()


def test_the_stream_decides():
    norms = torch.rand(200, generator=draw())
    first = ops.select_rows(norms, r=20, method="sample", seed=1, step=2, parameter=3)[0]
    torch.manual_seed(5)
    assert torch.equal(first, ops.select_rows(norms, r=20, method="sample", seed=1, step=2, parameter=3)[0])
    for other in (dict(seed=2, step=2, parameter=3), dict(seed=1, step=3, parameter=3), dict(seed=1, step=2, parameter=4)):
        assert not torch.equal(first, ops.select_rows(norms, r=20, method="sample", **other)[0])


def test_threads_change_nothing():
    norms = torch.rand(20000, generator=draw())
    want = [ops.select_rows(norms, r=500, method=method, seed=9) for method in METHODS]
    with threads(3):
        got = [ops.select_rows(norms, r=500, method=method, seed=9) for method in METHODS]
    assert all(torch.equal(a, b) for x, y in zip(got, want) for a, b in zip(x, y))


TURNS = 4000


@pytest.mark.parametrize("method", METHODS[1:])
def test_sampling_is_unbiased(method):
    """The mean of rho² over selections is 1 in every row: within 4.5 of its standard errors, in 10 rows."""
    norms = torch.tensor([0.01, 0.1, 0.2, 0.5, 1.0, 1.0, 2.0, 3.0, 5.0, 9.0])
    squares = torch.zeros(TURNS, len(norms), dtype=torch.float64)
    for step in range(TURNS):
        indices, scale = ops.select_rows(norms, r=4, method=method, seed=7, step=step)
        squares[step, indices.long()] = scale.double() ** 2
    # The rarest row is drawn a few times only: its standard error is that of the known distribution, not of the sample.
    kept = squares[:, 1:]
    error = (kept.mean(0) - 1).abs() / (kept.std(0) / TURNS**0.5).clamp(min=1e-12)
    assert error[kept.std(0) > 0].max() < 4.5 and (kept.mean(0)[kept.std(0) == 0] == 1).all()


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_single_draw_is_proportional_to_the_norm(method):
    norms = torch.tensor([1.0, 0.0, 2.0, 3.0, 4.0])
    hits = torch.zeros(5)
    for step in range(TURNS):
        hits[ops.select_rows(norms, r=1, method=method, seed=3, step=step)[0]] += 1
    q = norms / norms.sum()
    assert hits[1] == 0
    assert ((hits / TURNS - q).abs() < 4.5 * (q * (1 - q) / TURNS).sqrt() + 1e-9).all()


def test_replacement_has_the_papers_scale():
    """rho = 1 / sqrt(r q_j) for one draw, sqrt(c) times that for c of them; free places have scale 0."""
    norms = torch.tensor([8.0, 1.0, 1.0, 1.0, 1.0])
    q, seen = norms.double() / norms.double().sum(), set()
    for step in range(200):
        indices, scale = ops.select_rows(norms, r=3, method="sample_replace", step=step)
        draws = scale.double() ** 2 * 3 * q[indices.long()]
        torch.testing.assert_close(draws, draws.round(), atol=1e-5, rtol=0)
        assert draws.round().sum() == 3
        seen.add(tuple(sorted(draws.round().int().tolist())))
    assert {(1, 1, 1), (0, 1, 2), (0, 0, 3)} <= seen


def test_sampling_all_rows_is_the_identity():
    norms = torch.rand(30, generator=draw())
    indices, scale = ops.select_rows(norms, r=30, method="sample", seed=4)
    assert indices.tolist() == list(range(30)) and (scale == 1).all()


def test_exponential_is_the_logarithm():
    words = torch.cat([torch.randint(0, 2**32, (10000,), generator=draw()), torch.tensor([0, 1, 2**32 - 2, 2**31 - 1, 2**31])])
    want = -torch.log((words + 1).double() * 2.0**-32)
    torch.testing.assert_close(selection.exponential(words), want, rtol=1e-15, atol=0)
    assert selection.exponential(torch.tensor([2**32 - 1])) == 0
