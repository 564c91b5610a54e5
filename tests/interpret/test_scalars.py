"""The scalars of a step: their values against fp64, what advances, and the bytes they move."""

import math

import pytest
import torch

from lowrank_sys.kernels import traffic
from lowrank_sys.kernels.common import ACTIVE, ALPHA, CORRECTION1, CORRECTION2, DECAY, GRAD_SCALE
from lowrank_sys.kernels.scalars import advance, read

HYPER = {"lr": 3e-4, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "scale": 0.25}


def wanted(step, *, lr, beta1, beta2, weight_decay, scale, grad_scale=1.0, active=1.0):
    """The row of one step, in fp64."""
    return {
        CORRECTION1: 1 - beta1**step,
        CORRECTION2: -math.expm1(step * math.log(beta2)),
        DECAY: 1 - lr * weight_decay,
        ALPHA: -lr * scale,
        GRAD_SCALE: grad_scale,
        ACTIVE: active,
    }


def assert_row(row, want):
    for slot, value in want.items():
        assert row[slot.value].item() == pytest.approx(value, rel=3e-7, abs=1e-12), slot


@pytest.mark.parametrize("step", [1, 2, 10, 1000, 10**9])
@pytest.mark.parametrize("dtype", [None, torch.int64, torch.float32, torch.float64], ids=str)
def test_a_single_step(lane, step, dtype):
    number = step if dtype is None else torch.tensor(step, dtype=dtype, device=lane.device)
    rows, draws = read([number], lane.device, **HYPER, draws=True)
    assert_row(rows[0], wanted(step, **HYPER))
    assert draws.item() == step


def test_steps_of_several_kinds_are_only_read(lane):
    steps = [torch.tensor(3, device=lane.device), torch.tensor(7.0, dtype=torch.float64), torch.tensor(2.0, device=lane.device)]
    found_inf, grad_scale = (torch.full((1,), value, device=lane.device) for value in (0.0, 0.5))
    rows, draws = read(steps, lane.device, **HYPER, draws=True, found_inf=found_inf, grad_scale=grad_scale)
    assert draws.tolist() == [3, 7, 2] == [step.item() for step in steps]
    for row, step in zip(rows, (3, 7, 2)):
        assert_row(row, wanted(step, **HYPER, grad_scale=0.5))


def test_beta_0_needs_no_correction(lane):
    rows, _ = read([3], lane.device, **HYPER | {"beta1": 0.0})
    assert rows[0, CORRECTION1.value] == 1


@pytest.mark.parametrize("matrices", [1, 5, 128, 224])
def test_steps_advance_by_one(lane, matrices):
    steps = [torch.full((), float(i), device=lane.device) for i in range(matrices)]
    rows, draws = advance(
        steps,
        **HYPER | {"lr": torch.tensor(3e-4, device=lane.device)},
        draws=True,
        grad_scale=torch.tensor([0.5], device=lane.device),
        found_inf=torch.zeros(1, device=lane.device),
    )
    assert [step.item() for step in steps] == [i + 1 for i in range(matrices)] == draws.tolist()
    for i, row in enumerate(rows):
        assert_row(row, wanted(i + 1, **HYPER, grad_scale=0.5))


def test_found_inf_stops_the_counters_and_switches_the_rows_off(lane):
    steps = [torch.full((), float(i + 1), device=lane.device) for i in range(3)]
    rows, draws = advance(steps, **HYPER, draws=True, found_inf=torch.ones(1, device=lane.device))
    assert [step.item() for step in steps] == [1, 2, 3] == draws.tolist()
    for i, row in enumerate(rows):
        assert_row(row, wanted(i + 1, **HYPER, active=0.0))


@pytest.mark.parametrize("step", [math.nan, math.inf, 1e19])
def test_steps_that_are_no_number_draw_as_0(lane, step):
    _, draws = read([torch.tensor(step, device=lane.device)], lane.device, **HYPER, draws=True)
    assert draws.item() == 0


def test_traffic(lane, meter):
    advance([torch.zeros((), device=lane.device) for _ in range(200)], **HYPER, draws=True)
    (launch,) = meter.launches
    rows = traffic.scalars(200, step=torch.float32, rate=torch.float64, draws=True)
    assert {name: meter.bytes(launch, name) for name in launch.counts} == rows
