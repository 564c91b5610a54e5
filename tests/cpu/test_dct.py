"""dct_select and dct_columns against the explicit matrix in fp64; widths mix."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lowrank_sys  # noqa: F401  registers the ops
from lowrank_sys.subspace import dct

ops = torch.ops.lowrank
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
WIDTHS = (1, 2, 3, 7, 64, 97, 300)


def matrix(d):
    """D by its definition."""
    i, k = torch.arange(d, dtype=torch.float64)[:, None], torch.arange(d, dtype=torch.float64)
    return torch.cos(math.pi * (2 * i + 1) * k / (2 * d)) * torch.where(
        k == 0, (torch.ones(1).double() / d).sqrt(), (torch.full((1,), 2.0).double() / d).sqrt()
    )


def transform_norms(grad, left, norm):
    g = grad.double()
    s = matrix(g.shape[0]).T @ g if left else g @ matrix(g.shape[1])
    return torch.linalg.vector_norm(s, norm, dim=1 if left else 0)


@pytest.mark.parametrize("d", (*WIDTHS, 11008))
def test_columns(d):
    indices = torch.arange(d, dtype=torch.int32)[-300:]
    got = ops.dct_columns(indices, d=d)
    assert got.shape == (d, len(indices)) and got.dtype == torch.float32
    exact = matrix(d)[:, -300:] if d < 1000 else None
    if exact is not None:
        torch.testing.assert_close(got.double(), exact, atol=2.0**-24, rtol=2.0**-24)
    gram = got.double().T @ got.double()
    assert (gram - torch.eye(len(indices), dtype=torch.float64)).abs().max() < 1e-6


@SIDES
@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_selection(norm, left, dtype):
    """Matrices of several widths, in one process and in any order."""
    for d in (*WIDTHS, *reversed(WIDTHS)):
        grad = torch.randn((d, 40) if left else (40, d), generator=torch.Generator().manual_seed(d)).to(dtype)
        want, r = transform_norms(grad, left, norm), max(1, d // 3)
        indices, norms = ops.dct_select(grad, rank=r, left=left, norm=norm)
        assert indices.dtype == torch.int32 and (indices[1:] > indices[:-1]).all()
        torch.testing.assert_close(norms.double(), want[indices.long()], rtol=2e-6, atol=2e-5)
        # No column that was left out is larger, beyond rounding.
        rest = torch.ones(d, dtype=torch.bool)
        rest[indices.long()] = False
        assert not rest.any() or want[rest].max() <= want[indices.long()].min() * (1 + 2e-6) + 2e-5


@SIDES
def test_panels_change_nothing_but_rounding(left, monkeypatch):
    grad = torch.randn(70, 90)
    whole = dct.column_norms(grad, left=left)
    monkeypatch.setitem(dct.PANEL, "cpu", 200)
    torch.testing.assert_close(dct.column_norms(grad, left=left), whole, rtol=1e-5, atol=0)


@SIDES
def test_a_gradient_in_the_span_of_columns_selects_them(left):
    chosen = torch.tensor([0, 5, 17, 63], dtype=torch.int32)
    basis = ops.dct_columns(chosen, d=64)
    grad = basis @ torch.randn(4, 30) if left else torch.randn(30, 4) @ basis.T
    assert torch.equal(ops.dct_select(grad.contiguous(), rank=4, left=left)[0], chosen)


@SIDES
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_bad_channels_do_not_count(left, bad):
    grad = torch.randn(40, 40)
    clean = grad.clone()
    grad[3, 5] = bad
    (clean.T if left else clean)[5 if left else 3] = 0
    got, want = ops.dct_select(grad, rank=9, left=left), ops.dct_select(clean, rank=9, left=left)
    assert all(map(torch.equal, got, want))
    indices, norms = ops.dct_select(torch.full((20, 20), bad), rank=3, left=left)
    assert indices.tolist() == [0, 1, 2] and not norms.any()
    assert ops.dct_select(grad[:, :0] if left else grad[:0], rank=2, left=left)[0].tolist() == [0, 1]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.booleans(), st.integers(1, 2), st.data())
def test_any_shape(channels, d, left, norm, data):
    r = data.draw(st.integers(1, d))
    grad = torch.randn((d, channels) if left else (channels, d), generator=torch.Generator().manual_seed(r))
    indices, norms = ops.dct_select(grad, rank=r, left=left, norm=norm)
    assert (indices[1:] > indices[:-1]).all() and 0 <= indices.min() and indices.max() < d
    torch.testing.assert_close(norms.double(), transform_norms(grad, left, norm)[indices.long()], rtol=2e-6, atol=2e-5)


def test_one_graph():
    def run(grad):
        indices, norms = ops.dct_select(grad, rank=3, left=False)
        return ops.project(grad, ops.dct_columns(indices, d=grad.shape[1]), left=False), norms

    grad = torch.randn(8, 16)
    torch._dynamo.reset()
    for got, want in zip(torch.compile(run, fullgraph=True, backend="aot_eager")(grad), run(grad)):
        assert torch.equal(got, want)
