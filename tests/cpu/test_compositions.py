"""opcheck and bad input of the ops that are compositions: subspace_iteration, refresh_ and adafactor_step."""

import pytest
import torch

import lowrank_sys  # noqa: F401  registers the ops

ops = torch.ops.lowrank
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
M, N, R = 12, 20, 4
RATES = dict(decay_rate=-0.8, eps1=1e-30, eps2=1e-3, clip_threshold=1.0, weight_decay=0.1, scale=0.25, beta1=0.9)
FLAGS = dict(scale_parameter=True, relative_step=True, warmup_init=False)


def basis(left):
    return torch.linalg.qr(torch.randn(M if left else N, R))[0].contiguous()


def low_rank_shape(left):
    return (R, N) if left else (M, R)


@SIDES
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_subspace_iteration(left, warm):
    arguments = dict(rank=R, left=left, seed=3)
    torch.library.opcheck(ops.subspace_iteration.default, (torch.randn(M, N), basis(left) if warm else None), arguments)


def refresh_arguments(left, countdowns=(0, 3), **changes):
    count = len(countdowns)
    moments = [[torch.rand(low_rank_shape(left)) for _ in range(count)] for _ in range(2)]
    lists = [
        [basis(left) for _ in range(count)],
        [torch.randn(M, N) for _ in range(count)],
        [torch.tensor(c) for c in countdowns],
        *moments,
        [torch.tensor(5.0) for _ in range(count)],
    ]
    options = dict(left=left, gap=7, first_gaps=[2] * count, seeds=list(range(count)), subspace="randomized", moments="rotate")
    return (*lists, torch.tensor(0.1)), options | changes


@SIDES
@pytest.mark.parametrize("options", [{"moments": "rotate"}, {"moments": "reset"}, {"subspace": "svd"}], ids=str)
def test_refresh(left, options):
    torch.library.opcheck(ops.refresh_.default, *refresh_arguments(left, **options))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"gap": 0}, "gap must be at least 1, got 0"),
        ({"first_gaps": [1, 0]}, "first_gaps must be at least 1, got 0"),
        ({"seeds": [1]}, "seeds must have 2 tensors like bases, got 1"),
        ({"subspace": "pca"}, "subspace must be one of randomized, svd, got 'pca'"),
        ({"moments": "drop"}, "moments must be one of keep, reset, rotate, got 'drop'"),
        ({"countdowns": (0, 1.5)}, r"countdowns\[1\] must be a 0-dim int64 tensor on the CPU"),
    ],
)
def test_refresh_refuses(changes, message):
    arguments, options = refresh_arguments(True, **changes)
    before = [b.clone() for b in arguments[0]]
    with pytest.raises(RuntimeError, match=message):
        ops.refresh_(*arguments, **options)
    assert all(torch.equal(a, b) for a, b in zip(arguments[0], before))


def adafactor_arguments(shape, left=None):
    low_rank = shape if left is None else low_rank_shape(left)
    matrix = len(shape) == 2
    row, col = (torch.rand(low_rank[0], 1), torch.rand(1, low_rank[1])) if matrix else (None, None)
    return (
        torch.randn(shape),
        torch.randn(shape),
        None if left is None else basis(left),
        torch.zeros(low_rank),
        row,
        col,
        None if matrix else torch.rand(shape),
        torch.tensor(3.0),
    )


@pytest.mark.parametrize("shape, left", [((M, N), True), ((M, N), False), ((M, N), None), ((N,), None), ((2, 3, 4), None)], ids=str)
def test_adafactor(shape, left):
    options = dict(lr=torch.tensor(0.1), left=bool(left), skipped=torch.tensor(0), **RATES, **FLAGS)
    torch.library.opcheck(ops.adafactor_step.default, adafactor_arguments(shape, left), options)


@pytest.mark.parametrize(
    "place, value, message",
    [
        (1, torch.zeros(N, M), r"grad must have shape \(12, 20\), got \(20, 12\)"),
        (2, torch.zeros(M + 1, R), r"basis must have shape \(m = 12, r\) for left=True, got \(13, 4\)"),
        (3, torch.zeros(M, R), r"exp_avg must have shape \(4, 20\), got \(12, 4\)"),
        (4, None, "row and col are for matrices"),
        (7, torch.zeros(1), r"steps\[0\] must be a 0-dim tensor, got shape \(1,\)"),
    ],
)
def test_adafactor_refuses(place, value, message):
    arguments = list(adafactor_arguments((M, N), True))
    arguments[place] = value
    before = arguments[0].clone()
    with pytest.raises(RuntimeError, match=message):
        ops.adafactor_step(*arguments, lr=torch.tensor(0.1), left=True, **RATES, **FLAGS)
    assert torch.equal(arguments[0], before)


def test_adafactor_of_zero_rows_beside_large_ones_stays_finite():
    """The rank-1 estimate of a zero row leaves fp32 beside a row of 1e18; its update does not."""
    param, grad = torch.ones(4, 5), torch.zeros(4, 5)
    grad[1, 2] = 1e18
    row, col, step = torch.zeros(4, 1), torch.zeros(1, 5), torch.tensor(0.0)
    ops.adafactor_step(
        param,
        grad,
        None,
        None,
        row,
        col,
        None,
        step,
        lr=torch.tensor(0.1),
        left=True,
        **RATES | dict(weight_decay=0.0),
        **FLAGS | dict(relative_step=False, scale_parameter=False),
    )
    assert (param[1, 2] < 1) and param.isfinite().all()
    param[1, 2] = 1
    assert (param == 1).all()
