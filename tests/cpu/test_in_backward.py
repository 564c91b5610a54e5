"""per_layer="in_backward": the ordinary step, taken inside backward."""

import copy
import math

import pytest
import torch
from small_model import CLOSE, assert_same, backward, build, galore, groups, loss_of, tokens, train

from lowrank_sys.optim import GaLoreAdafactor, InBackward


@pytest.mark.parametrize("keys", [{}, {"subspace": "svd"}, {"refresh": "next"}, {"moments": "rotate"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_in_backward_is_the_ordinary_step(keys, dtype):
    dense, model = build(dtype), build(dtype)
    train(dense, galore(dense, None, **keys), range(12))
    train(model, galore(model, "in_backward", **keys), range(12))
    assert_same(dense, model)


def test_adafactor_in_backward():
    dense, model = build(), build()
    for m, per_layer in ((dense, None), (model, "in_backward")):
        train(m, GaLoreAdafactor(groups(m), per_layer=per_layer), range(8))
    assert_same(dense, model)
    clipped = build()
    train(clipped, GaLoreAdafactor(groups(clipped), per_layer=InBackward(max_norm=0.5)), range(8))
    assert all(p.isfinite().all() for p in clipped.parameters())


def test_in_backward_clips_by_the_norm_of_the_previous_step():
    dense, model = build(), build()
    reference = galore(dense, None, refresh="next")
    optimizer = galore(model, InBackward(max_norm=0.5), refresh="next")
    previous = 0.0
    for step in range(10):
        backward(dense, step)
        norm = reference.clip_grad_norm_(math.inf).item()
        for p in dense.parameters():
            p.grad *= min(1.0, 0.5 / (previous + 1e-6))
        previous = norm
        reference.step()
        reference.zero_grad()
        train(model, optimizer, [step])
    assert previous > 0.5
    assert_same(dense, model, **CLOSE)
    unclipped = build()
    train(unclipped, galore(unclipped, "in_backward", refresh="next"), range(10))
    assert not torch.allclose(unclipped[1].weight, model[1].weight, atol=1e-4)


def test_in_backward_refuses_accumulation():
    model = build()
    optimizer = galore(model, "in_backward")
    backward(model, 0)
    after = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"a second backward before step\(\).*use per_layer='accumulate'"):
        backward(model, 1)
    assert all(torch.equal(v, after[k]) for k, v in model.state_dict().items())
    assert model[1].weight.grad is None
    optimizer.zero_grad()
    backward(model, 2)
    optimizer.step()
    backward(model, 3)
    optimizer.step()


def test_in_backward_refuses_a_grad_scaler():
    for unscale in (False, True):
        model = build()
        optimizer = galore(model, "in_backward")
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(loss_of(model, tokens(0))).backward()
        if unscale:
            scaler.unscale_(optimizer)
        head = model.head.weight.detach().clone()
        with pytest.raises(RuntimeError, match="takes no GradScaler"):
            scaler.step(optimizer)
        assert torch.equal(model.head.weight, head)
    with pytest.raises(ValueError, match=r"InBackward\(max_norm=...\)"):
        optimizer.clip_grad_norm_(1.0)
