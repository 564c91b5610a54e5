"""The gap of each matrix grows while its subspace stays: by the overlap of subspaces, not of signed vectors."""

import pytest
import torch
from refreshed import advance
from torch import nn

from lowrank_sys.optim import GaLoreAdamW, QGaLoreAdamW8bit
from lowrank_sys.subspace.gap import overlap
from lowrank_sys.subspace.orthonormal import Orthonormal

NAN = float("nan")


def orthonormal(d, r, seed=0):
    return torch.linalg.qr(torch.randn(d, r, generator=torch.Generator().manual_seed(seed)))[0].contiguous()


def test_overlap_is_that_of_subspaces():
    b = orthonormal(80, 8)
    rotation = orthonormal(8, 8, seed=1)
    flipped = b * torch.tensor([1, -1] * 4)
    for same in (b, flipped, b.flip(1), b @ rotation, flipped.bfloat16()):
        assert overlap(b, same).item() == pytest.approx(1, abs=2e-2 if same.dtype == torch.bfloat16 else 1e-5)
        assert overlap(b, same) <= 1
    other = torch.linalg.qr(torch.cat([b, torch.randn(80, 8)], dim=1))[0][:, 8:]
    assert overlap(b, other).item() == pytest.approx(0, abs=1e-5)
    assert overlap(b, torch.cat([b[:, :4], other[:, :4]], dim=1)).item() == pytest.approx(0.5, abs=1e-5)
    chance = torch.stack([overlap(orthonormal(80, 8, s), orthonormal(80, 8, s + 99)) for s in range(40)]).mean()
    assert chance.item() == pytest.approx(8 / 80, abs=0.01)


def refresh(basis, grad, gap, queue, countdown=0, lr=0.1, threshold=0.4, most=100):
    """One step of the schedule on a matrix with a gap of its own; (countdown, gap, queue) after it."""
    state = {"basis": basis, "countdown": torch.tensor(countdown), "gap": torch.tensor(gap), "overlaps": torch.tensor(queue)}
    advance(
        Orthonormal(), [grad], [state | {"first_gap": 3, "seed": 0}], left=True, lr=lr, subspace="svd", update_proj_gap=7,
        cos_threshold=threshold, max_update_proj_gap=most,
    )  # fmt: skip
    return state["countdown"].item(), state["gap"].item(), state["overlaps"].tolist()


def gradient(basis):
    """Whose leading left singular vectors span the basis."""
    return basis @ torch.randn(basis.shape[1], 50)


def test_flipped_vectors_count_as_the_same():
    """Q-GaLore's signed cosine would be -1 here, and the gap never grow."""
    basis = orthonormal(40, 4)
    countdown, gap, queue = refresh(-basis, gradient(basis), 10, [NAN, 1.0])
    assert queue == pytest.approx([1, 1], abs=1e-5) and (countdown, gap) == (19, 20)


@pytest.mark.parametrize(
    "queue, same, want",
    [
        ([NAN, NAN, NAN], True, 10),  # not full yet
        ([NAN, 1.0, 1.0], True, 20),
        ([1.0, 0.0, 0.0], True, 10),  # a mean of 1/3
        ([0.0, 0.3, 0.0], True, 20),  # (0.3 + 0 + 1) / 3
        ([1.0, 1.0, 1.0], False, 20),  # one stranger among friends
        ([1.0, 0.0, 1.0], False, 10),
    ],
)
def test_the_mean_of_the_queue_decides(queue, same, want):
    basis, other = torch.linalg.qr(torch.randn(40, 8, generator=torch.Generator().manual_seed(3)))[0].split(4, dim=1)
    countdown, gap, now = refresh(basis.contiguous(), gradient(basis if same else other), 10, queue)
    assert gap == want and countdown == want - 1
    assert now == pytest.approx([*queue[1:], 1.0 if same else 0.0], abs=1e-5, nan_ok=True)


def test_bounded_and_never_shorter():
    basis = orthonormal(40, 4)
    assert refresh(basis.clone(), gradient(basis), 70, [1.0])[1] == 100
    assert refresh(basis.clone(), gradient(basis), 130, [1.0])[1] == 130


@pytest.mark.parametrize(
    "options, grad",
    [({"countdown": 3}, None), ({"countdown": -1}, None), ({"lr": 0.0}, None), ({}, NAN), ({}, 0.0)],
    ids=["not due", "first", "rate 0", "not finite", "zero"],
)
def test_what_says_nothing(options, grad):
    """No refresh, a first basis, a step that trains nothing, and a basis that was kept for want of a gradient."""
    basis = orthonormal(40, 4)
    grad = gradient(basis) if grad is None else torch.full((40, 50), grad)
    countdown, gap, queue = refresh(basis, grad, 10, [1.0, 1.0, 1.0], **options)
    assert gap == 10 and queue == [1.0, 1.0, 1.0]


def run(optimizer, param, steps, grad):
    """Steps at which the basis changed."""
    changed, before = [], None
    for step in range(steps):
        param.grad = grad(step)
        optimizer.step()
        now = optimizer.state[param]["basis"].clone()
        if before is None or not torch.equal(now, before):
            changed.append(step)
        before = now
    return changed


@pytest.mark.parametrize("quant", [True, False], ids=["int4", "dense"])
def test_gaps_double_while_the_subspace_stays(quant):
    """A spectrum that stays: after queue_size comparisons every refresh doubles the gap, up to the bound."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(64, 96))
    basis = orthonormal(64, 4)
    optimizer = QGaLoreAdamW8bit(
        [{"params": [param], "rank": 4, "update_proj_gap": 2, "queue_size": 3, "quant": quant, "max_update_proj_gap": 12}], lr=1e-3
    )
    noise = lambda: 1e-3 * torch.randn(64, 96)  # noqa: E731  so that each refresh changes some bytes
    run(optimizer, param, 1, lambda _: basis @ torch.randn(4, 96) + noise())
    state = optimizer.state[param]
    history = []
    for _ in range(60):
        due = state["countdown"].item() == 0
        run(optimizer, param, 1, lambda _: basis @ torch.randn(4, 96) + noise())
        if due:
            history.append(state["gap"].item())
    assert history[:7] == [2, 2, 4, 8, 12, 12, 12]
    (described,) = optimizer.refreshes().values()
    assert described["gap"] == 12 and described["countdown"] == state["countdown"]
    assert described["overlaps"] == pytest.approx([1, 1, 1], abs=0.05)


def test_gaps_stay_where_the_subspace_moves():
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(64, 96))
    optimizer = QGaLoreAdamW8bit([{"params": [param], "rank": 2, "update_proj_gap": 2, "queue_size": 2}], lr=1e-3)
    run(optimizer, param, 30, lambda step: orthonormal(64, 2, seed=step) @ torch.randn(2, 96))
    (described,) = optimizer.refreshes().values()
    assert described["gap"] == 2 and max(described["overlaps"]) < 0.4


def test_each_matrix_has_its_own():
    torch.manual_seed(0)
    still, moving = nn.Parameter(torch.randn(64, 96)), nn.Parameter(torch.randn(64, 96))
    optimizer = QGaLoreAdamW8bit(
        [{"params": [("still", still), ("moving", moving)], "rank": 2, "update_proj_gap": 2, "queue_size": 2}], lr=1e-3
    )
    basis = orthonormal(64, 2)
    for step in range(20):
        still.grad = basis @ torch.randn(2, 96)
        moving.grad = orthonormal(64, 2, seed=step) @ torch.randn(2, 96)
        optimizer.step()
    described = optimizer.refreshes()
    assert described["still"]["gap"] > 2 == described["moving"]["gap"]


def test_sketched_refreshes_adapt_too():
    """refresh='next': the first basis follows a seeded one, which says nothing; later ones are compared."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(64, 96))
    basis = orthonormal(64, 4)
    optimizer = QGaLoreAdamW8bit(
        [{"params": [param], "rank": 4, "update_proj_gap": 2, "queue_size": 2, "refresh": "next"}], lr=1e-3
    )
    run(optimizer, param, 1, lambda _: basis @ torch.randn(4, 96))
    assert optimizer.state[param]["overlaps"].isnan().all()
    run(optimizer, param, 20, lambda _: basis @ torch.randn(4, 96))
    assert optimizer.state[param]["gap"] > 2 and optimizer.state[param]["overlaps"].min() > 0.95


def test_other_methods_may_adapt_and_fixed_gaps_say_nothing():
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(64, 96))
    optimizer = GaLoreAdamW([{"params": [param], "rank": 4, "update_proj_gap": 1, "cos_threshold": 0.4, "queue_size": 1}], lr=1e-3)
    run(optimizer, param, 60, lambda _: torch.ones(64, 96))
    assert optimizer.state[param]["gap"] == 16  # the default bound, 16 update_proj_gap
    optimizer.param_groups[0]["cos_threshold"] = None  # from here on the common gap
    run(optimizer, param, 20, lambda _: torch.ones(64, 96))
    assert optimizer.state[param]["gap"] == 16 and optimizer.state[param]["countdown"] == 0
    fixed = GaLoreAdamW([{"params": [param], "rank": 4}])
    run(fixed, param, 1, lambda _: torch.ones(64, 96))
    (described,) = fixed.refreshes().values()
    assert described == {"countdown": 0}  # its first gap is one step
