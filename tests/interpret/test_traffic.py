"""Bytes loaded and stored in the interpreter, against the formulas of `lowrank_sys.kernels.traffic`."""

import pytest
import torch

from lowrank_sys._ops.named_steps import bound
from lowrank_sys.kernels import configs, roofline, traffic
from lowrank_sys.kernels.back_project import back_project_
from lowrank_sys.kernels.project import project
from lowrank_sys.kernels.step import step

FP32, BF16 = torch.float32, torch.bfloat16
galore_step, galore_step_list, subspace_step = (bound(form, step) for form in ("galore_step", "galore_step.list", "subspace_step"))
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
TYPES = pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)


def assert_bytes(meter, launch, rows):
    """Every argument of `launch` but the scalars moves the bytes of its row."""
    for name in launch.counts:
        if name not in ("scalars", "counters"):
            assert meter.bytes(launch, name) == rows.pop(name), name
    assert all(row == (0, 0) for row in rows.values()), rows


@pytest.fixture
def card(device, monkeypatch):
    card = configs.Target(80, 6)
    monkeypatch.setattr(configs, "target", lambda _: card)
    return card


@SIDES
@TYPES
@pytest.mark.parametrize(
    "shape", [(520, 200, 8), (208, 528, 16), (63, 100, 63), (144, 160, 128), (60, 70, 130), (160, 144, 144)], ids=str
)
def test_galore_step(lane, meter, card, shape, dtype, left):
    m, n, r = shape
    case = lane.case(m, n, r, left, dtype, dtype, dtype)
    galore_step(*case.tensors(), step=1, lr=1e-2, left=left, **lane.hyper)
    _, first, second = meter.launches
    total = traffic.step(m, n, r, left=left, weight=dtype, grad=dtype, basis=dtype, card=card)
    for launch, rows in zip((first, second), total):
        assert_bytes(meter, launch, dict(rows))
    # The full-sized tensors: G once per tile of r, W once each way, and nothing else of that size.
    assert (first.counts["grad"]["loaded"] == -(-r // 128)).all() and not first.counts["grad"]["stored"].any()
    assert (second.counts["weight"]["loaded"] == 1).all() and (second.counts["weight"]["stored"] == 1).all()
    for launch in (first, second):
        for name, counts in launch.counts.items():
            assert name in ("grad", "weight", "partials") or counts["loaded"].size <= max(m, n) * r + 512, name
    counted = sum(
        sum(meter.bytes(launch, name))
        for launch in (first, second)
        for name in launch.counts
        if name not in ("scalars", "counters")
    )
    assert counted == sum(sum(map(sum, rows.values())) for rows in total)


@SIDES
def test_a_shared_launch_moves_the_bytes_of_its_matrices(lane, meter, card, left):
    cases = [lane.case(208, 528, 16, left, seed=i) for i in range(4)]
    steps = [torch.zeros((), device=lane.device) for _ in cases]
    galore_step_list(*map(list, zip(*(case.tensors() for case in cases))), steps, lr=torch.tensor(1e-2), left=left, **lane.hyper)
    _, first, second = meter.launches
    for launch, rows in zip((first, second), traffic.step(208, 528, 16, left=left, weight=FP32, grad=FP32, basis=FP32, card=card)):
        assert_bytes(meter, launch, {name: (4 * loaded, 4 * stored) for name, (loaded, stored) in rows.items()})


@SIDES
def test_partials_are_used_and_bounded(lane, meter, card, left):
    m, n = (900, 90) if left else (90, 900)
    case = lane.case(m, n, 6, left)
    project(case.grad, case.basis, left=left)
    (launch,) = meter.launches
    loaded, stored = meter.bytes(launch, "partials")
    assert loaded == stored > 0
    assert loaded + stored <= 0.25 * case.grad.numel() * 4
    assert (launch.counts["partials"]["loaded"] == 1).all() and (launch.counts["partials"]["stored"] == 1).all()
    assert (launch.counts["out"]["stored"] == 1).all()


@SIDES
def test_subspace_step(lane, meter, card, left):
    case = lane.case(140, 150, 70, left)
    subspace_step(*case.tensors("low_rank"), step=1, lr=1e-2, left=left, **lane.hyper)
    _, first, second = meter.launches
    kind = {"left": left, "weight": FP32, "grad": FP32, "basis": FP32, "projected": True, "card": card}
    for launch, rows in zip((first, second), traffic.step(140, 150, 70, **kind)):
        assert_bytes(meter, launch, rows)


@SIDES
def test_back_project(lane, meter, card, left):
    case = lane.case(140, 160, 80, left, BF16, BF16, BF16)
    back_project_(case.param, case.low_rank, case.basis, left=left)
    rows = traffic.apply(140, 160, 80, left=left, weight=BF16, low_rank=FP32, basis=BF16, card=card)
    assert_bytes(meter, meter.launches[0], rows)


CARDS = [
    configs.Target(80, 108),
    configs.Target(86, 84),
    configs.Target(89, 128),
    configs.Target(90, 132),
    configs.Target(100, 148),
    configs.Target(120, 170),
]


@SIDES
@TYPES
@pytest.mark.parametrize("card", CARDS, ids=lambda card: f"sm_{card.arch}")
@pytest.mark.parametrize(
    "shape", [(4096, 4096, 128), (4096, 11008, 128), (11008, 4096, 128), (1024, 1024, 64), (4096, 4096, 1024)], ids=str
)
def test_realistic_shapes_by_formula(shape, card, dtype, left):
    m, n, r = shape
    rows = traffic.step(m, n, r, left=left, weight=dtype, grad=dtype, basis=dtype, card=card)
    first, second = rows[0], rows[-1]
    plan = traffic.plan_project(m, n, r, left=left, grad=dtype, basis=dtype, card=card, moments=True)
    full, cache = m * n * dtype.itemsize, roofline.FIGURES[card.arch].cache << 20
    assert first["grad"] == (full * (-(-r // 128) if plan.fused else 1), 0)
    assert second["weight"] == (full, full)
    # Partial sums are few, or never leave the cache: where the rule runs on pieces, R itself passes through it once.
    few = sum(first["partials"]) <= 0.25 * full
    assert few or plan.parts == 1 or (first["partials"].stored <= cache / 2 and configs.together(m, n, card) == 1)
    low_rank = traffic.compulsory(m, n, r, left=left, param=dtype, grad=dtype, basis=dtype) - 3 * full
    assert low_rank == (m if left else n) * r * dtype.itemsize + 4 * (n if left else m) * r * 4
    if r <= 128 and min(m, n) >= 4096:
        assert plan.tiles * plan.splits >= 0.75 * card.multiprocessors, "the projection leaves a quarter of the card idle"
