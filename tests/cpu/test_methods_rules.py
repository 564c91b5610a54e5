"""Muon and ASGO in a subspace, and all methods of these rules and schedules with moments in 8 bits."""

import copy

import pytest
import torch
from small_model import backward
from test_methods import GAP, assert_alike, made, mean_loss, run
from torch import nn

from lowrank_sys.optim import ASGO, CapturedStep, MoFaSGD, Muon

SUBSPACE = pytest.mark.parametrize("name", ["muon", "asgo"])
LOW = {"rank": 8, "update_proj_gap": GAP}


@pytest.mark.parametrize("how", [{}, {"dtype": torch.bfloat16}, {"int8": True}], ids=["fp32", "bf16", "int8"])
@SUBSPACE
def test_in_a_subspace_it_trains_and_resumes(name, how):
    model, optimizer = made(name, **LOW, **how)
    start = mean_loss(model)
    run(model, optimizer, range(GAP + 2))
    resumed, again = made(name, **LOW, **how)
    resumed.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (resumed, again)):
        run(m, o, range(GAP + 2, 30))
    assert_alike(model, resumed)
    assert mean_loss(model) < start - 0.05
    state = optimizer.state[optimizer.param_groups[1]["params"][0]]
    assert state["exp_avg"].shape == (96, 8) and state["basis"].shape == (48, 8)
    assert name == "muon" or state["gram"].shape == (8, 8)


@SUBSPACE
def test_in_a_subspace_r_accumulates(name):
    start = mean_loss(made(name)[0])
    model, optimizer = made(name, per_layer="accumulate", **LOW)
    for step in range(30):
        backward(model, step, micro=2)
        optimizer.step()
        optimizer.zero_grad()
    assert mean_loss(model) < start - 0.05


@pytest.mark.parametrize("name", ["galore-lion", "muon", "asgo", "lisa", "owlore", "gum", "grades"])
def test_moments_in_8_bits_train_and_resume(name):
    model, optimizer = made(name, bits=8, min_8bit_size=0, **({"rank": 16} if name == "owlore" else {}))
    start = mean_loss(model)
    run(model, optimizer, range(GAP + 2))
    moments = [s[key] for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq") if key in s]
    assert torch.uint8 in {moment.dtype for moment in moments} and optimizer.memory()["other"] == 0
    resumed, again = made(name, bits=8, min_8bit_size=0, **({"rank": 16} if name == "owlore" else {}))
    resumed.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (resumed, again)):
        run(m, o, range(GAP + 2, 20))
    assert_alike(model, resumed)
    assert mean_loss(model) < start - 0.05


@pytest.mark.parametrize("cls, keys", [(Muon, {"rank": None}), (ASGO, {"rank": None}), (MoFaSGD, {"rank": 3})])
def test_found_inf_and_rows_that_are_not_finite_leave_what_they_touch(cls, keys):
    matrix = nn.Parameter(torch.randn(8, 12))
    optimizer = cls([{"params": [matrix], **keys}], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        matrix.grad = torch.randn(8, 12)
        optimizer.step()

    def held():
        state = {k: v.clone() for k, v in optimizer.state[matrix].items() if isinstance(v, torch.Tensor)}
        return {"weight": matrix.detach().clone(), **state}

    before = held()
    matrix.grad = torch.randn(8, 12)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.ones(())
    optimizer.step()
    after = held()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    optimizer.grad_scale = optimizer.found_inf = None
    matrix.grad[3, 5] = torch.nan
    optimizer.step()
    after = held()
    assert all(value.isfinite().all() for value in after.values())
    assert after["weight"][3, 5] == before["weight"][3, 5] and (after["weight"] != before["weight"]).sum() >= 84


@pytest.mark.parametrize("size", [1e-15, 1e15])
@pytest.mark.parametrize("cls, keys", [(Muon, {"rank": None}), (MoFaSGD, {"rank": 3})])
def test_what_sees_directions_alone_takes_a_gradient_of_any_size(cls, keys, size):
    steps = []
    for factor in (1.0, size):
        torch.manual_seed(0)
        matrix = nn.Parameter(torch.zeros(8, 12))
        optimizer = cls([{"params": [matrix], **keys}], lr=1e-2)
        for _ in range(3):
            matrix.grad = torch.randn(8, 12) * factor
            optimizer.step()
        steps.append(matrix.detach())
    torch.testing.assert_close(steps[1], steps[0], atol=1e-5, rtol=1e-3)


def test_clipping_by_the_optimizer_takes_whole_matrices_too():
    matrix = nn.Parameter(torch.zeros(8, 12))
    optimizer = Muon([{"params": [matrix], "rank": None}])
    matrix.grad = torch.full((8, 12), 2.0)
    assert optimizer.clip_grad_norm_(1.0) == pytest.approx(2 * 96**0.5)
    assert matrix.grad.norm() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize(
    "cls, keys, message",
    [
        (Muon, {"rank": 4, "moments": "covariance"}, "moments='covariance' needs exp_avg_sq, error"),
        (ASGO, {"rank": 4, "moments": "reset"}, "moments must be one of keep for OneSided, got 'reset'"),
        (Muon, {"rank": None, "refresh": "next"}, "rank must be an integer of at least 1 with refresh='next', got None"),
        (MoFaSGD, {"rank": None}, "rank must be an integer of at least 1, got None"),
        (MoFaSGD, {"rank": 9}, r"rank must be at most 8 for parameter 0 of shape \(8, 12\), got 9"),
        (Muon, {"rank": None, "momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
    ],
)
def test_refused(cls, keys, message):
    with pytest.raises(ValueError, match=message):
        cls([{"params": [nn.Parameter(torch.zeros(8, 12))], **keys}])


def test_a_captured_step_refuses_what_reads_the_host():
    optimizer = MoFaSGD([{"params": [nn.Parameter(torch.zeros(8, 12))], "rank": 3}])
    with pytest.raises(ValueError, match="on the host's word to be captured, got MoFaSGD"):
        CapturedStep(optimizer)
