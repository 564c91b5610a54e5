"""Gradients that are not to be used leave what they touch as it is."""

import pytest
import torch
from methods.inputs import COMMON, gradients, tensors
from torch import nn

from lowrank_sys.optim import MoFaSGD, Muon
from lowrank_sys.optim.preset import METHODS

NEW = ("fira-lion", "coap", "ldadam", "scale", "sinkgd")
EACH_NEW = pytest.mark.parametrize("name", NEW)


def warmed(name, left=True, steps=5, keys=None):
    """(a matrix, its optimizer) after some steps."""
    torch.manual_seed(0)
    matrix, method = nn.Parameter(torch.randn(8, 12)), METHODS[name]
    if keys is None:
        keys = {"rank": None} if method.rank is None else {"rank": 3} if name == "ldadam" else {"rank": 3, "update_proj_gap": 2}
    sides = {} if keys["rank"] is None else {"proj_type": "left" if left else "right"}
    optimizer = method.optimizer([{"params": [matrix], **sides, **keys}], **COMMON)
    for g in gradients((8, 12), steps):
        matrix.grad = g
        optimizer.step()
    return matrix, optimizer


@pytest.mark.parametrize("finite", [True, False], ids=["finite here", "not finite here"])
@pytest.mark.parametrize("due", [True, False], ids=["due", "not due"])
@pytest.mark.parametrize("name", [*NEW, "muon", "asgo", "mofasgd"])
def test_found_inf_leaves_every_byte(name, due, finite):
    keys = {"rank": None, "momentum": 0.9} if name == "scale" else None
    matrix, optimizer = warmed(name, steps=4 if due else 5, keys=keys)
    before = tensors(optimizer, matrix)
    matrix.grad = torch.randn(8, 12)
    if not finite:
        matrix.grad[1, 2] = torch.inf
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.ones(())
    optimizer.step()
    after = tensors(optimizer, matrix)
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert optimizer.skipped() == 0
    optimizer.found_inf = torch.zeros(())
    matrix.grad = torch.randn(8, 12)
    optimizer.step()
    assert not torch.equal(matrix, before["weight"])
    if due and "basis" in before:
        assert not torch.equal(optimizer.state[matrix]["basis"], before["basis"])


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@EACH_NEW
def test_a_channel_that_is_not_finite_stays(name, left):
    """Between two refreshes: at one of LDAdam's, each step, a channel's moments are carried into the new basis."""
    keys = {"scale": {"rank": None, "momentum": 0.9}, "ldadam": {"rank": 3, "update_proj_gap": 100}}
    matrix, optimizer = warmed(name, left, keys=keys.get(name))
    by_column = METHODS[name].rank is not None and left
    channel = (slice(None), 5) if by_column else (3, slice(None))
    before = tensors(optimizer, matrix)
    matrix.grad = torch.randn(8, 12)
    matrix.grad[3, 5] = torch.nan
    optimizer.step()
    after = tensors(optimizer, matrix)
    names = {"weight", "exp_avg", "exp_avg_sq", "error"} & before.keys()
    for key in names:
        assert torch.equal(after[key][channel], before[key][channel]) and after[key].isfinite().all()
        assert not torch.equal(after[key], before[key])
    moved = (after["weight"] != before["weight"]).sum()
    assert moved == 96 - matrix[channel].numel() and optimizer.skipped() == matrix[channel].numel()


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf, 1e30], ids=str)
@EACH_NEW
def test_a_refresh_that_cannot_be_stays_due(name, bad, first):
    matrix, optimizer = warmed(name, steps=0 if first else 4)
    matrix.grad = torch.zeros(8, 12) if bad == 0 else torch.full((8, 12), bad)
    optimizer.step()
    state = optimizer.state[matrix]
    values = tensors(optimizer, matrix)
    assert all(value.isfinite().all() for value in values.values())
    if "basis" in state:
        b = state["basis"]
        torch.testing.assert_close(b.T @ b, torch.eye(3), atol=0.1, rtol=0)  # COAP's leave the sphere by its steps
        matrix.grad = torch.randn(8, 12)
        optimizer.step()
        assert not torch.equal(state["basis"], values["basis"]) and state["basis"].isfinite().all()


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
