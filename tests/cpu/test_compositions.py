"""opcheck and bad input of the ops that are compositions: subspace_iteration and refresh_; Adafactor against its paper."""

import pytest
import torch

from lowrank_sys.optim import GaLoreAdafactor

ops = torch.ops.lowrank
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
M, N, R = 12, 20, 4


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
    """Two matrices as lowrank_sys.subspace.Orthonormal hands them over, each with `changes`."""
    tensors, gradients = [], []
    for countdown in countdowns:
        state = [basis(left), torch.tensor(countdown), *(torch.rand(low_rank_shape(left)) for _ in range(2)), torch.tensor(5.0)]
        tensors += state
        gradients.append(torch.randn(M, N))
    options = dict(
        kind="Orthonormal", select="randomized", transport="rotate", keys=["basis", "countdown", "exp_avg", "exp_avg_sq", "step"],
        number_keys=["first_gap", "seed"], moments=["exp_avg", "exp_avg_sq"], signed=[True, False],
        hyper_keys=["update_proj_gap"], hyper=[7.0], left=left,
    )  # fmt: skip
    return (tensors, gradients, [2, 0] * len(countdowns), torch.tensor(0.1)), options | changes


@SIDES
@pytest.mark.parametrize("options", [{"transport": "rotate"}, {"transport": "reset"}, {"select": "svd"}], ids=str)
def test_refresh(left, options):
    torch.library.opcheck(ops.refresh_.default, *refresh_arguments(left, **options))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kind": "Nothing"}, "kind must be one of .*Orthonormal.*, got Nothing"),
        ({"select": "pca"}, "select must be one of randomized, svd, .*got pca"),
        ({"transport": "drop"}, "transport must be one of keep, reset, rotate, .*got drop"),
        ({"hyper_keys": ["update_proj_gap"], "hyper": [0.0]}, "update_proj_gap must be at least 1, got 0"),
        ({"keys": ["basis", "countdown"]}, "tensors must have basis, countdown for each of 2 gradients, got 10"),
        ({"number_keys": ["seed"]}, "numbers must have seed for each of 2 gradients, got 4"),
        ({"keys": ["basis", "wait", "exp_avg", "exp_avg_sq", "step"]}, "keys must name a countdown, got basis, wait"),
        ({"signed": [True]}, "signed must have 2 tensors like moments, got 1"),
        ({"hyper": []}, "hyper must have 1 tensors like hyper_keys, got 0"),
        ({"countdowns": (0, 1.5)}, r"countdown of matrix 1 must be a 0-dim int64 tensor on the CPU"),
    ],
)
def test_refresh_refuses(changes, message):
    arguments, options = refresh_arguments(True, **changes)
    before = [tensor.clone() for tensor in arguments[0]]
    with pytest.raises(RuntimeError, match=message):
        ops.refresh_(*arguments, **options)
    assert all(torch.equal(a, b) for a, b in zip(arguments[0], before))


@pytest.mark.parametrize("bad", [0, 1], ids=["first", "second"])
@pytest.mark.parametrize(
    "gradient, message",
    [
        (torch.randn(M + 1, N), r"basis must have shape \(13, r\), got \(12, 4\)"),
        (torch.randn(M), "gradient must be a matrix"),
        (torch.randn(M, R - 1), "rank must be at most 3, got 4"),
    ],
)
def test_a_gradient_that_does_not_fit_is_refused_before_anything_is_written(bad, gradient, message):
    arguments, options = refresh_arguments(True, countdowns=(0, 0))
    arguments[1][bad] = gradient
    before = [tensor.clone() for tensor in arguments[0]]
    with pytest.raises(RuntimeError, match=message):
        ops.refresh_(*arguments, **options)
    assert all(torch.equal(a, b) for a, b in zip(arguments[0], before))


def adafactor(params, **options):
    return GaLoreAdafactor(params, lr=0.1, relative_step=False, scale_parameter=False, **options)


def plainly(w, g, b, state, *, left, lr, beta1, weight_decay, scale):
    """A step in fp64 as in the paper, R over the root of row col / mean(row). Returns W; state advances in place."""
    r = g if b is None else b.T @ g if left else g @ b
    state["step"] += 1
    beta2 = 1 - state["step"] ** -0.8
    if r.dim() == 2:
        for name, dim in (("row", 1), ("col", 0)):
            state[name] = beta2 * state[name] + (1 - beta2) * (r.square() + 1e-30).mean(dim, keepdim=True)
        root = (state["row"] * state["col"] / state["row"].mean()).sqrt()
    else:
        state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * (r.square() + 1e-30)
        root = state["exp_avg_sq"].sqrt()
    update = r / root
    update = lr * update / max(1.0, update.square().mean().sqrt().item())
    if beta1 is not None:
        update = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * update
    back = update if b is None else scale * (b @ update if left else update @ b.T)
    return (1 - lr * weight_decay) * w - back


@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize("shape, left", [((M, N), True), ((M, N), False), ((M, N), None), ((N,), None), ((2, 3, 4), None)], ids=str)
def test_adafactor_is_the_papers(shape, left, beta1):
    param = torch.nn.Parameter(torch.randn(shape))
    group = {"params": [param]} if left is None else {"params": [param], "rank": R, "proj_type": "left" if left else "right"}
    optimizer = adafactor([group], beta1=beta1, weight_decay=0.1)
    want, state = param.detach().double(), {"step": 0.0, "exp_avg": 0.0, "row": 0.0, "col": 0.0, "exp_avg_sq": 0.0}
    for _ in range(4):
        param.grad = torch.randn(shape)
        optimizer.step()
        b = None if left is None else optimizer.state[param]["basis"].double()
        want = plainly(want, param.grad.double(), b, state, left=left, lr=0.1, beta1=beta1, weight_decay=0.1, scale=0.25)
    torch.testing.assert_close(param.detach().double(), want, rtol=1e-5, atol=1e-5)
    for name, value in state.items():
        if name in optimizer.state[param]:
            torch.testing.assert_close(optimizer.state[param][name].double(), torch.as_tensor(value).double(), rtol=1e-5, atol=1e-7)


def test_adafactor_of_zero_rows_beside_large_ones_stays_finite():
    """The rank-1 estimate of a zero row leaves fp32 beside a row of 1e18; its update does not."""
    param = torch.nn.Parameter(torch.ones(4, 5))
    param.grad = torch.zeros(4, 5)
    param.grad[1, 2] = 1e18
    adafactor([param]).step()
    with torch.no_grad():
        assert (param[1, 2] < 1) and param.isfinite().all()
        param[1, 2] = 1
    assert (param == 1).all()


def test_adafactor_leaves_out_what_is_not_finite():
    """Channels, and elements without a subspace: weights and first moments as they were, and counted."""
    for left in (True, False, None):
        param = torch.nn.Parameter(torch.randn(M, N))
        group = {"params": [param]} if left is None else {"params": [param], "rank": R, "proj_type": "left" if left else "right"}
        optimizer = adafactor([group], beta1=0.9, weight_decay=0.1)
        param.grad = torch.randn(M, N)
        optimizer.step()
        before, first = param.detach().clone(), optimizer.state[param]["exp_avg"].clone()
        param.grad[2, 3] = torch.nan
        optimizer.step()
        out = torch.zeros(M, N, dtype=torch.bool)
        out[slice(None) if left is True else 2, slice(None) if left is False else 3] = True
        assert torch.equal(param.detach() == before, out) and optimizer.skipped() == out.sum()
        kept = optimizer.state[param]["exp_avg"] == first
        assert torch.equal(kept, out if left is None else out[:R] if left else out[:, :R])
        assert all(value.isfinite().all() for value in optimizer.state[param].values() if isinstance(value, torch.Tensor))
