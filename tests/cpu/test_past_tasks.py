"""PastTasks: what past tasks have used stays as it is, by the criterion of the paper, with any optimizer, and after a resume."""

import io

import pytest
import torch
from torch import nn

from lowrank_sys.nn import quantize_model
from lowrank_sys.optim import (
    Accumulate,
    APOLLOAdamW,
    FiraAdamW,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GrassAdamW,
    InBackward,
    Muon,
    PastTasks,
    SinkGD,
)

M, N, STEPS = 12, 20, 6
OURS = {"rank": 6, "update_proj_gap": 3}
OPTIMIZERS = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1),
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
    "plain GaLoreAdamW": lambda params: GaLoreAdamW(params, lr=1e-2, weight_decay=0.1),
    "GaLoreAdamW": lambda params: GaLoreAdamW([{"params": params, **OURS}], lr=1e-2, weight_decay=0.1),
    "on the right": lambda params: GaLoreAdamW([{"params": params, **OURS, "proj_type": "right"}], lr=1e-2, weight_decay=0.1),
    "8 bits": lambda params: GaLoreAdamW8bit([{"params": params, **OURS}], lr=1e-2, min_8bit_size=0),
    "APOLLO": lambda params: APOLLOAdamW([{"params": params, **OURS}], lr=1e-2),
    "Fira": lambda params: FiraAdamW([{"params": params, **OURS}], lr=1e-2),
    "Grass": lambda params: GrassAdamW([{"params": params, **OURS}], lr=1e-2),
    "Muon": lambda params: Muon([{"params": params, "rank": None}], lr=1e-2),
}
EACH = pytest.mark.parametrize("name", OPTIMIZERS)
SIDES = pytest.mark.parametrize("side", ["left", "right"])


def matrix():
    return nn.Parameter(torch.randn(M, N, generator=torch.Generator().manual_seed(0)))


def directions(size, task):
    """Two directions (2, size) of a task, orthogonal to those of the others."""
    return torch.linalg.qr(torch.randn(size, 6, generator=torch.Generator().manual_seed(9)))[0].T[2 * task : 2 * task + 2]


def gradient(task, step):
    """Of rank 2, on the task's outputs and inputs."""
    middle = torch.randn(2, 2, generator=torch.Generator().manual_seed(100 * task + step))
    return directions(M, task).T @ middle @ directions(N, task)


def learn(optimizer, weight, task, steps=range(STEPS)):
    for step in steps:
        weight.grad = gradient(task, step)
        optimizer.step()


def turned(weight, side):
    return (weight if side == "right" else weight.T).detach().double()


@SIDES
@EACH
def test_updates_avoid_what_past_tasks_have_used(name, side):
    """After each task: W U as it was to rounding, with decay, whatever the rule, and the rest of W moves."""
    weight = matrix()
    optimizer = OPTIMIZERS[name]([weight])
    tasks = PastTasks(optimizer, threshold=0.99, side=side)
    counts = []
    for task in range(3):
        before, basis = turned(weight, side), tasks.state_dict()["bases"].get("parameter 0 of group 0")
        learn(optimizer, weight, task)
        moved = turned(weight, side) - before
        assert moved.norm() > 0.01
        if basis is not None:
            torch.testing.assert_close(moved @ basis.double(), torch.zeros(len(moved), basis.shape[1]).double(), atol=3e-6, rtol=0)
            torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-5, rtol=0)
        (count,) = tasks.finish_task().values()
        counts.append(count)
    assert 0 < counts[0] < counts[1] <= counts[2]


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.999])
def test_the_basis_is_the_papers_of_the_first_moments(threshold):
    """The fewest leading directions of what the basis leaves of M, that hold the share together with the basis."""
    weight = matrix()
    optimizer = torch.optim.AdamW([weight], lr=1e-2)
    tasks, basis = PastTasks(optimizer, threshold=threshold), torch.zeros(N, 0).double()
    for task in range(3):
        for step in range(STEPS):
            weight.grad = gradient(task, step) + 0.1 * gradient((task + 1) % 3, step)
            optimizer.step()
        m = optimizer.state[weight]["exp_avg"].double()
        _, values, vh = torch.linalg.svd(m - m @ basis @ basis.T, full_matrices=False)
        held = [((m @ basis).square().sum() + values[:k].square().sum()) / m.square().sum() for k in range(M + 1)]
        count = next(k for k, share in enumerate(held) if share >= threshold)
        basis = torch.cat([basis, vh[:count].T], 1)
        (found,) = tasks.finish_task().values()
        ours = tasks.state_dict()["bases"]["parameter 0 of group 0"].double()
        assert found == basis.shape[1]
        torch.testing.assert_close(ours @ ours.T, basis @ basis.T, atol=1e-5, rtol=0)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_the_first_moment_of_a_subspace_is_projected_back(left):
    weight = matrix()
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 4, "proj_type": "left" if left else "right"}], lr=1e-2)
    learn(optimizer, weight, 0)
    state = optimizer.state[weight]
    m = state["basis"] @ state["exp_avg"] if left else state["exp_avg"] @ state["basis"].T
    outer, inner = optimizer.first_moment(weight)
    torch.testing.assert_close(outer @ inner, m)
    tasks = PastTasks(optimizer, threshold=1.0)
    tasks.finish_task()
    basis = tasks.state_dict()["bases"]["parameter 0 of group 0"]
    torch.testing.assert_close(m @ basis @ basis.T, m, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["AdamW", "GaLoreAdamW", "8 bits"])
def test_an_old_task_is_remembered(name):
    """Two regressions whose inputs overlap: the second does not touch what the first has learnt, and without PastTasks it does."""
    torch.manual_seed(0)
    shared = 0.3 * torch.randn(1, N)
    data = []
    for task in range(2):
        x = torch.randn(32, 2) @ directions(N, task) + torch.randn(32, 1) @ shared
        data.append((x, x @ torch.randn(N, M)))
    worse = []
    for kept in (True, False):
        weight = matrix()
        optimizer = OPTIMIZERS[name]([weight])
        for group in optimizer.param_groups:
            group.update(lr=5e-2, weight_decay=0.0)
        tasks, found = PastTasks(optimizer, threshold=1 - 1e-9), []
        for x, y in data:
            for _ in range(40):
                nn.functional.mse_loss(x @ weight.T, y).backward()
                optimizer.step()
                optimizer.zero_grad()
            found.append([nn.functional.mse_loss(a @ weight.T, b).item() for a, b in data])
            if kept:
                assert sum(tasks.finish_task().values()) == 1 + 2 * len(found)
        worse.append(found[1][0] / found[0][0])
        assert found[1][1] < 0.9 * found[0][1]  # the second one is learnt
    assert worse[0] < 1.001 and worse[1] > 1.05


@EACH
def test_a_run_goes_on_to_the_bit(name):
    weight, other = matrix(), matrix()
    optimizer = OPTIMIZERS[name]([weight])
    tasks = PastTasks(optimizer, threshold=0.9)
    learn(optimizer, weight, 0)
    tasks.finish_task()
    learn(optimizer, weight, 1, range(2))
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "tasks": tasks.state_dict(), "weight": weight.detach()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = OPTIMIZERS[name]([other])
    again = PastTasks(resumed, threshold=0.9)
    other.data.copy_(saved["weight"])
    resumed.load_state_dict(saved["optimizer"])
    again.load_state_dict(saved["tasks"])
    for one, p, past in ((optimizer, weight, tasks), (resumed, other, again)):
        learn(one, p, 1, range(2, STEPS))
        past.finish_task()
        learn(one, p, 2)
    assert torch.equal(weight, other) and again.tasks == tasks.tasks == 2
    assert torch.equal(*(one.state_dict()["bases"]["parameter 0 of group 0"] for one in (tasks, again)))


def test_what_has_no_gradient_stays_and_a_part_that_is_removed_lets_go():
    weight, frozen = matrix(), matrix()
    optimizer = torch.optim.AdamW([weight, frozen], lr=1e-2, weight_decay=0.1)
    tasks = PastTasks(optimizer)
    frozen.grad = gradient(0, 0)
    learn(optimizer, weight, 0)
    assert all(count > 0 for count in tasks.finish_task().values())
    frozen.grad, before = None, frozen.detach().clone()
    learn(optimizer, weight, 1)
    assert torch.equal(frozen, before)
    basis, before = tasks.state_dict()["bases"]["parameter 0 of group 0"], weight.detach().clone()
    tasks.remove()
    learn(optimizer, weight, 0)
    assert ((weight - before) @ basis).norm() > 0.01


def test_a_step_that_is_none_and_one_that_is_not_finite_spoil_nothing():
    weight = matrix()
    optimizer = GaLoreAdamW([{"params": [weight], **OURS}], lr=1e-2)
    tasks = PastTasks(optimizer)
    learn(optimizer, weight, 0)
    tasks.finish_task()
    before = weight.detach().clone()
    weight.grad = torch.full((M, N), torch.nan)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before, atol=1e-6, rtol=0)
    learn(optimizer, weight, 1)
    assert weight.isfinite().all() and (weight - before).norm() > 0.01


def layer():
    return nn.Sequential(nn.Linear(N, M, bias=False))


REFUSALS = {
    "threshold": (lambda: PastTasks(OPTIMIZERS["AdamW"]([matrix()]), threshold=0), r"threshold must be in \(0, 1\], got 0"),
    "side": (lambda: PastTasks(OPTIMIZERS["AdamW"]([matrix()]), side="inputs"), "side must be one of left, right, got 'inputs'"),
    "no optimizer": (lambda: PastTasks(layer()), "optimizer must be one of torch or of lowrank_sys.optim, got Sequential"),
    "no moment": (
        lambda: PastTasks(torch.optim.SGD([matrix()], lr=1.0)),
        "optimizer must keep a first moment of parameter 0 of group 0 for PastTasks, SGD keeps none",
    ),
    "no moment of ours": (lambda: PastTasks(SinkGD([{"params": [matrix()], "rank": None}])), "SinkGD keeps none"),
    "Adafactor without beta1": (
        lambda: PastTasks(GaLoreAdafactor([{"params": [matrix()], "rank": 4}])),
        "GaLoreAdafactor keeps none",
    ),
    "no matrix": (lambda: PastTasks(torch.optim.AdamW([nn.Parameter(torch.zeros(3))])), "params must have a matrix, got none"),
    "another's": (
        lambda: PastTasks(OPTIMIZERS["AdamW"]([matrix()]), params=[matrix()]),
        r"params must be of the optimizer, got one of shape \(12, 20\) that is not",
    ),
    "a stack": (
        lambda: PastTasks(GaLoreAdamW([{"params": [nn.Parameter(torch.zeros(2, 8, 8))], "rank": 2}])),
        r"must be a matrix of floats in one place for PastTasks, got one of shape \(2, 8, 8\)",
    ),
    "INT8": (
        lambda: PastTasks(GaLoreAdamW8bit([{"params": list(quantize_model(layer()).parameters()), "rank": 2}])),
        "must be a matrix of floats in one place for PastTasks, got one of INT8",
    ),
    "accumulate": (
        lambda: per_layer(lambda model: Accumulate(model=model)),
        "per_layer must be None for PastTasks, got accumulate",
    ),
    "in_backward": (lambda: per_layer(lambda model: InBackward()), "per_layer must be None for PastTasks, got "),
}


def per_layer(mode):
    model = layer()
    return PastTasks(GaLoreAdamW([{"params": list(model.named_parameters()), "rank": 2}], per_layer=mode(model)))


@pytest.mark.parametrize("make, message", REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_state_of_other_matrices_is_refused():
    weight = matrix()
    optimizer = OPTIMIZERS["AdamW"]([weight])
    tasks = PastTasks(optimizer)
    learn(optimizer, weight, 0)
    tasks.finish_task()
    state = tasks.state_dict()
    for change, message in (
        ({"side": "left"}, "side of the loaded state must be right, as of this object's, got left"),
        ({"bases": {"w": torch.zeros(N, 1)}}, "the loaded state must be of parameter 0 of group 0, got w"),
        ({"bases": {"parameter 0 of group 0": torch.zeros(M, 2)}}, r"must have shape \(20, k\), and what it keeps \(12, k\), got"),
    ):
        with pytest.raises(ValueError, match=message):
            tasks.load_state_dict({**state, **change})
    assert tasks.tasks == 1
