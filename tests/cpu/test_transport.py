"""rotate_moments_: exact where it can be, V >= 0 always."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lowrank_sys  # noqa: F401  registers the ops
from lowrank_sys.subspace import transport

rotate = torch.ops.lowrank.rotate_moments_
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
D, N, R = 30, 50, 6


def orthonormal(seed, d=D, r=R):
    return torch.linalg.qr(torch.randn(d, r, generator=torch.Generator().manual_seed(seed)))[0].contiguous()


def moments(left, n=N, r=R, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (r, n) if left else (n, r)
    return torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)


def channels_first(x, left):
    return x if left else x.T


@SIDES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_the_formula(left, dtype):
    old, new = orthonormal(1).to(dtype), orthonormal(2).to(dtype)
    m, v = moments(left)
    m64, v64 = m.double(), v.double()
    assert rotate(m, v, old, new, left=left) is None
    c = transport.rotation(old, new, torch.float64)
    m64, v64 = transport.rotated(m64, c, left=left), transport.rotated(v64, c * c, left=left)
    torch.testing.assert_close(m.double(), m64, atol=2e-6, rtol=0)
    torch.testing.assert_close(v.double(), v64, atol=2e-6, rtol=0)
    # The moment of the full space, seen through both bases.
    before = channels_first(moments(left)[0], left).double()
    torch.testing.assert_close(channels_first(m64, left), new.double().T @ (old.double() @ before))


@SIDES
@pytest.mark.parametrize("basis", ["orthonormal", "gaussian", "bf16"])
def test_the_same_basis_changes_no_bit(left, basis):
    old = {"orthonormal": orthonormal(1), "gaussian": torch.randn(D, R), "bf16": orthonormal(1).bfloat16()}[basis]
    m, v = moments(left)
    want = m.clone(), v.clone()
    rotate(m, v, old, old.clone(), left=left)
    assert torch.equal(m, want[0]) and torch.equal(v, want[1])


@SIDES
def test_a_permutation_permutes_and_flipped_signs_flip(left):
    identity, order = torch.eye(D)[:, :R].contiguous(), torch.tensor([3, 0, 5, 1, 4, 2])
    signs = torch.tensor([1.0, -1, -1, 1, -1, 1])
    m, v = moments(left)
    want_m, want_v = (channels_first(x, left)[order] for x in (m.clone(), v.clone()))
    rotate(m, v, identity, (identity[:, order] * signs).contiguous(), left=left)
    assert torch.equal(channels_first(m, left), want_m * signs[:, None])
    assert torch.equal(channels_first(v, left), want_v)


@SIDES
def test_an_orthogonal_subspace_forgets(left):
    eye = torch.eye(D)
    m, v = moments(left)
    rotate(m, v, eye[:, :R].contiguous(), eye[:, R : 2 * R].contiguous(), left=left)
    assert not m.any() and not v.any()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(0, 20),
    st.integers(1, 8),
    st.booleans(),
    st.integers(0, 10**6),
    st.sampled_from([1e-30, 1.0, 1e15]),
)
def test_second_moments_stay_nonnegative(d, n, r, left, seed, size):
    generator = torch.Generator().manual_seed(seed)
    old, new = (torch.randn(d, r, generator=generator) for _ in range(2))
    m, v = moments(left, n, r, seed)
    v.mul_(size).masked_fill_(v < 0.3 * size, 0)
    rotate(m, v, old, new, left=left)
    assert (v >= 0).all() and m.isfinite().all()


@pytest.mark.parametrize(
    "change, expected",
    [
        (dict(old=torch.zeros(D, R + 1)), "rotate_moments_: old must have shape (d, r = 6) for left=True, got (30, 7)"),
        (dict(new=torch.zeros(D + 1, R)), "new must have shape (30, 6), got (31, 6)"),
        (dict(exp_avg_sq=torch.zeros(R, N + 1)), "exp_avg_sq must have shape (6, 50), got (6, 51)"),
        (dict(exp_avg=torch.zeros(R, N).double()), "exp_avg must be torch.float32, got torch.float64"),
        (dict(old=torch.zeros(D, R).int()), "old must be float32, bfloat16 or float16, got torch.int32"),
        (dict(exp_avg=torch.zeros(R)), "exp_avg must be a matrix, got shape (6,)"),
    ],
)
def test_bad_arguments(change, expected):
    a = dict(zip(("exp_avg", "exp_avg_sq"), moments(True))) | dict(old=orthonormal(1), new=orthonormal(2)) | change
    before = a["exp_avg"].clone()
    with pytest.raises(RuntimeError) as caught:
        rotate(*a.values(), left=True)
    assert expected in str(caught.value)
    assert torch.equal(a["exp_avg"], before)
