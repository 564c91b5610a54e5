"""newton_schulz: Muon's iteration in fp64 is the truth; hostile input is defined."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

import lowrank_sys  # noqa: F401  registers the ops
from lowrank_sys.subspace import orthogonalize

newton_schulz = torch.ops.lowrank.newton_schulz
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SHAPES = [(1, 1), (1, 50), (50, 1), (40, 40), (30, 70), (70, 30), (600, 700), (700, 600)]


def published(x, steps=5, coefficients=COEFFICIENTS):
    """As it is printed: normalize, transpose a tall matrix, iterate."""
    a, b, c = coefficients
    x = x.double()
    x = x / x.norm()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def draw(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_the_published_iteration(shape, dtype):
    x = draw(shape).to(dtype)
    before = x.clone()
    got = newton_schulz(x)
    assert got.shape == shape and got.dtype == torch.float32 and got.is_contiguous() and torch.equal(x, before)
    # Singular values lie below 1.3 and each step may amplify an error by a = 3.4 at most.
    torch.testing.assert_close(got.double(), published(x), atol=3e-5, rtol=0)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_steps_and_coefficients(steps):
    x = draw((20, 30))
    got = newton_schulz(x, steps=steps, a=2.0, b=-1.5, c=0.5)
    torch.testing.assert_close(got.double(), published(x, steps, (2.0, -1.5, 0.5)), atol=1e-5, rtol=0)


def test_singular_values_come_near_one():
    u, _, vh = torch.linalg.svd(draw((60, 90)), full_matrices=False)
    x = u @ torch.diag(torch.linspace(1.0, 0.05, 60)) @ vh
    y = newton_schulz(x)
    values = torch.linalg.svdvals(y)
    assert values.min() > 0.65 and values.max() < 1.25
    # The singular vectors are those of x.
    core = (u.T @ y @ vh.T).double()
    assert (core - torch.diag(core.diagonal())).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (600, 520)])
@pytest.mark.parametrize("rank", [1, 7])
def test_a_deficient_rank_stays(shape, rank):
    x = draw((shape[0], rank)) @ draw((rank, shape[1]), seed=1)
    values = torch.linalg.svdvals(newton_schulz(x))
    assert values[rank - 1] > 0.3 and (values[rank:] < 1e-3).all()


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-3, 1e25, 1e38])
def test_any_scale(size):
    x = draw((20, 30)).clamp(-3, 3)
    got, want = newton_schulz(x * size), newton_schulz(x)
    torch.testing.assert_close(got, want, atol=1e-5 if size > 1e-38 else 0.3, rtol=0)  # 1e-42 has few bits


@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf])
def test_nothing_usable_gives_zeros(bad):
    x = torch.zeros(20, 30)
    assert torch.equal(newton_schulz(x), x)
    x = draw((20, 30)) if bad else x
    x[3, 4] = bad
    assert not newton_schulz(x).any()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty(shape):
    assert newton_schulz(torch.zeros(shape)).shape == shape


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 25), st.integers(1, 25), st.integers(0, 10**6))
def test_any_shape(m, n, seed):
    x = draw((m, n), seed)
    got = newton_schulz(x)
    torch.testing.assert_close(got.double(), published(x), atol=3e-5, rtol=0)
    assert torch.equal(newton_schulz(-x), -got)


def test_symmetric_products_are_products():
    x = draw((700, 300)).T.contiguous().T
    gram = orthogonalize.gram_into(torch.empty(700, 700), x, False)
    bound = 2.0**-23 * 300**0.5 * (x.double().abs() @ x.double().abs().T).max().item()  # a rounding for each root of the depth
    torch.testing.assert_close(gram.double(), x.double() @ x.double().T, atol=bound, rtol=0)
    assert torch.equal(gram, gram.T)
    got = orthogonalize.polynomial_into(torch.empty(700, 700), gram / 700, 1.0, 2.0, 3.0)
    a = gram.double() / 700
    torch.testing.assert_close(got.double(), torch.eye(700).double() + 2 * a + 3 * a @ a, atol=1e-5, rtol=0)


@pytest.fixture
def tensor_cores(monkeypatch):
    """The way of a GPU, its bf16 products with fp32 sums made in fp32."""
    plain = torch.mm

    def mm(a, b, *, out_dtype):
        assert a.dtype == b.dtype == torch.bfloat16 and out_dtype == torch.float32
        return plain(a.float(), b.float())

    monkeypatch.setattr(orthogonalize, "on_tensor_cores", lambda x: x.dtype == torch.float32)
    monkeypatch.setattr(torch, "mm", mm)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_tensor_cores(tensor_cores, shape, dtype):
    """A rounded pair of operands puts 2u into A, a step makes (|b| + 2|c|) times that of it, and the next ones do not grow it,
    as the singular values are near 1: 18u, with u = 2⁻⁹, or 2⁻¹⁷ for two parts."""
    x = draw(shape).to(dtype)
    got, want = newton_schulz(x), published(x)
    assert got.dtype == torch.float32 and got.is_contiguous()
    bound = 18 * 2.0 ** (-17 if dtype == torch.float32 else -9)
    torch.testing.assert_close(got.double(), want, atol=bound, rtol=0)
    torch.testing.assert_close(torch.linalg.svdvals(got.double()), torch.linalg.svdvals(want), atol=bound, rtol=0)
    assert torch.equal(newton_schulz(-x), -got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (600, 520)])
def test_on_tensor_cores_a_deficient_rank_stays(tensor_cores, shape, dtype):
    x = torch.zeros(shape)
    x[:7, :5] = draw((7, 5))
    x[7:14] = x[:7]
    values = torch.linalg.svdvals(newton_schulz(x.to(dtype)).double())
    assert values[4] > 0.3 and (values[5:] < 1e-3).all()


def test_on_a_gpu_the_tensor_cores_are_taken():
    with FakeTensorMode():
        for dtype in (torch.float32, torch.bfloat16):
            for shape in ((30, 50), (50, 30)):
                x = torch.empty(shape, device="cuda", dtype=dtype)
                assert orthogonalize.on_tensor_cores(x.float())
                assert orthogonalize.iterate(x).dtype == torch.float32 and orthogonalize.iterate(x).shape == shape
        assert not orthogonalize.on_tensor_cores(torch.empty(3, 3, device="cuda", dtype=torch.float64))
