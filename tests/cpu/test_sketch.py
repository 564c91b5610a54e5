"""Bases from the sketch of a gradient: sketch_directions, and refreshes that are sketched."""

import pytest
import torch
from refreshed import advance

from lowrank_sys.subspace.orthonormal import Orthonormal

ops = torch.ops.lowrank


def matrices(left, waits):
    """(states, sketches); None for a matrix that is not due."""
    m, n, r = 12, 20, 4
    states, shape = [], (r, n) if left else (m, r)
    for i, wait in enumerate(waits):
        made = {"basis": torch.linalg.qr(torch.randn(m if left else n, r))[0].contiguous(), "countdown": torch.tensor(wait)}
        made |= {"exp_avg": torch.rand(shape), "exp_avg_sq": torch.rand(shape), "step": torch.tensor(5.0)}
        states.append(made | {"first_gap": 3, "seed": i})
    return states, [torch.randn((m, 12) if left else (12, n)) if wait in (0, -1) else None for wait in waits]


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_refresh_from_sketch(left):
    states, sketches = matrices(left, (0, -1, -3, 2))
    before = [s["basis"].clone() for s in states]
    advance(Orthonormal(), sketches, states, left=left, sketched=True, update_proj_gap=7, moments="rotate")
    assert [s["countdown"].item() for s in states] == [6, 2, -2, 1]  # gap, first gap, one nearer, one nearer
    assert [torch.equal(b, s["basis"]) for b, s in zip(before, states)] == [False, False, True, True]


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_a_rate_of_0_and_a_missing_sketch_leave_all_as_it_is(left):
    states, sketches = matrices(left, (0, -1))
    before = [{key: copy(value) for key, value in s.items()} for s in states]
    advance(Orthonormal(), sketches, states, left=left, sketched=True, lr=0.0, moments="rotate")
    advance(Orthonormal(), [None, None], states, left=left, sketched=True, moments="rotate")
    assert all(torch.equal(torch.as_tensor(s[key]), torch.as_tensor(b[key])) for s, b in zip(states, before) for key in b)


def copy(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_a_sketch_that_does_not_fit_is_refused_before_anything_is_written(left):
    states, sketches = matrices(left, (0, -1))
    sketches[1] = (sketches[1][:, :3] if left else sketches[1][:3]).contiguous()
    before = [s["basis"].clone() for s in states]
    with pytest.raises(RuntimeError, match="rank must be at most 3, got 4"):
        advance(Orthonormal(), sketches, states, left=left, sketched=True)
    assert all(torch.equal(s["basis"], b) for s, b in zip(states, before))


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_sketch_finds_the_subspace(left, dtype):
    """Exact for a gradient of rank r; with a warm start within 1% of the best energy where singular values decay."""
    torch.manual_seed(0)
    m, n, r = 60, 90, 8
    basis = torch.linalg.qr(torch.randn(m if left else n, r))[0].contiguous().to(dtype)
    other = n if left else m

    def refreshed(grad, exp_avg):
        omega = ops.sketch_directions(basis, exp_avg, other=other, left=left, seed=3)
        assert omega.dtype == dtype and omega.shape == (other, 16)
        gram = omega.float().T @ omega.float()
        torch.testing.assert_close(gram, torch.eye(16), atol=2e-2 if dtype == torch.bfloat16 else 1e-4, rtol=0)
        parts = [ops.project(g, omega, left=not left) for g in (0.3 * grad, 0.7 * grad)]
        new = basis.clone()
        state = {"basis": new, "countdown": torch.tensor(0), "first_gap": 1, "seed": 3}
        advance(Orthonormal(), [parts[0] + parts[1]], [state], left=left, sketched=True)
        r_ = ops.project(grad.contiguous(), new.float(), left=left)
        return (r_.norm() ** 2 / torch.linalg.svdvals(grad)[:r].square().sum()).item()

    u, _, vh = torch.linalg.svd(torch.randn(m, n), full_matrices=False)
    exact = (u[:, :r] * torch.linspace(2, 1, r)) @ vh[:r]
    assert refreshed(exact, None) > (1 - 1e-3 if dtype == torch.bfloat16 else 1 - 1e-5)
    decaying = (u * 0.9 ** torch.arange(60)) @ vh
    exp_avg = (u[:, :r].T @ decaying if left else decaying @ vh[:r].T).contiguous()
    cold = refreshed(decaying, None)
    assert refreshed(decaying, exp_avg) > 0.99 and refreshed(decaying, exp_avg) > cold
    assert refreshed(decaying, torch.zeros_like(exp_avg)) == pytest.approx(cold, abs=1e-2)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_sketch_directions_opcheck_and_errors(left):
    basis = torch.linalg.qr(torch.randn(12, 4))[0].contiguous()
    exp_avg = torch.randn((4, 20) if left else (20, 4))
    torch.library.opcheck(ops.sketch_directions.default, (basis, exp_avg), {"other": 20, "left": left, "seed": 1})
    with pytest.raises(RuntimeError, match="other must be at least rank = 4, got 3"):
        ops.sketch_directions(basis, None, other=3, left=left)
    with pytest.raises(RuntimeError, match="exp_avg must have shape"):
        ops.sketch_directions(basis, exp_avg.T.contiguous(), other=20, left=left)
