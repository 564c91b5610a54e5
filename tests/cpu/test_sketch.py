"""Bases from the sketch of a gradient: sketch_directions and refresh_from_sketch_."""

import pytest
import torch

ops = torch.ops.lowrank


def arguments_of_refresh(left, waits=(0, -1, -3, 2), **changes):
    m, n, r = 12, 20, 4
    count = len(waits)
    made = [torch.linalg.qr(torch.randn(m if left else n, r))[0].contiguous() for _ in range(count)]
    sketches = [torch.randn((m, 12) if left else (12, n)) if wait in (0, -1) else torch.empty(0) for wait in waits]
    shape = (r, n) if left else (m, r)
    lists = [
        made,
        sketches,
        [torch.tensor(w) for w in waits],
        *([torch.rand(shape) for _ in waits] for _ in range(2)),
        [torch.tensor(5.0) for _ in waits],
    ]
    options = {"left": left, "gap": 7, "first_gaps": [3] * count, "seeds": list(range(count)), "moments": "rotate"}
    return (*lists, torch.tensor(0.1)), options | changes


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_refresh_from_sketch(left):
    arguments, options = arguments_of_refresh(left)
    before = [b.clone() for b in arguments[0]]
    ops.refresh_from_sketch_(*arguments, **options)
    assert [c.item() for c in arguments[2]] == [6, 2, -2, 1]  # gap, first gap, one nearer, one nearer
    assert [torch.equal(b, a) for b, a in zip(before, arguments[0])] == [False, False, True, True]
    arguments, options = arguments_of_refresh(left, waits=(0,))
    torch.library.opcheck(ops.refresh_from_sketch_.default, arguments, options)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"gap": 0}, "gap must be at least 1, got 0"),
        ({"seeds": [1]}, "seeds must have 4 tensors like bases, got 1"),
        ({"moments": "drop"}, "moments must be one of keep, reset, rotate, got 'drop'"),
        ({}, r"sketch must have shape \(12, l\) with l >= rank = 4 for left=True, got \(12, 3\)"),
    ],
)
def test_refresh_from_sketch_refuses(changes, message):
    arguments, options = arguments_of_refresh(True)
    arguments[1][1] = arguments[1][1][:, :3].contiguous()
    before = [b.clone() for b in arguments[0]]
    with pytest.raises(RuntimeError, match=message):
        ops.refresh_from_sketch_(*arguments, **options | changes)
    assert all(torch.equal(a, b) for a, b in zip(arguments[0], before))


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
        ops.refresh_from_sketch_(
            [new],
            [parts[0] + parts[1]],
            [torch.tensor(0)],
            [],
            [],
            [],
            torch.tensor(0.1),
            left=left,
            gap=5,
            first_gaps=[1],
            seeds=[3],
            moments="keep",
        )
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
