"""per_layer: state, checkpoints and copies."""

import copy
import io

import pytest
import torch
from small_model import CLOSE, EACH, GAP, MODES, assert_same, backward, bases, build, coefficients, galore, train


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_resume_is_exact(mode, dtype):
    """After 6 steps: the matrices are in the middle of a gap, between two windows."""
    micro = 2 if "accum" in mode else 1
    model = build(dtype)
    optimizer = galore(model, MODES[mode]())
    train(model, optimizer, range(6), micro)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = build(dtype)
    other = galore(resumed, MODES[mode]())
    backward(resumed, 50)  # a window in progress is dropped
    resumed.load_state_dict(saved["model"], strict=True)
    other.load_state_dict(saved["optimizer"])
    assert all(p.grad is None for p in coefficients(resumed).values())
    resumed.zero_grad()  # the plain gradients, as after any load
    train(model, optimizer, range(6, 15), micro)
    train(resumed, other, range(6, 15), micro)
    assert_same(model, resumed)


@EACH
def test_state_is_tensors_and_plain_numbers(mode):
    model = build()
    optimizer = galore(model, MODES[mode]())
    train(model, optimizer, range(2))
    for state in optimizer.state.values():
        assert all(isinstance(value, (torch.Tensor, bool, int)) for value in state.values())
    assert len(optimizer.state) == len(model.state_dict())


def test_checkpoints_are_the_same_in_every_mode():
    """Accumulated, then on whole gradients, then accumulated: the same as throughout."""
    model, moved = build(), build()
    optimizer = galore(model)
    train(model, optimizer, range(12))
    states = None
    for steps, per_layer in ((range(5), "accumulate"), (range(5, 9), None), (range(9, 12), "accumulate")):
        other = galore(moved, per_layer)
        if states is not None:
            other.load_state_dict(states)
        train(moved, other, steps)
        states = other.state_dict()
    assert_same(model, moved, **CLOSE)
    assert [len(g["params"]) for g in states["param_groups"]] == [7, 2]
    assert states["param_groups"][1]["param_names"] == ["1.weight", "3.weight"]


def test_a_checkpoint_of_the_usual_schedule_goes_on_accumulating():
    model = build()
    optimizer = galore(model, None)
    train(model, optimizer, range(5))
    other = galore(model)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group.pop("refresh", None)  # as before the key existed
    other.load_state_dict(state)
    before = bases(other)
    assert other.param_groups[1]["refresh"] == "next"
    train(model, other, range(5, 5 + GAP), 2)
    assert all(not torch.equal(b, n) for b, n in zip(before, bases(other)))


def test_a_checkpoint_of_exact_bases_is_refused():
    model = build()
    optimizer = galore(model, None, subspace="svd")
    train(model, optimizer, range(2))
    other = galore(build())
    with pytest.raises(ValueError, match="a state with subspace='svd' cannot go on with per_layer='accumulate'"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


@EACH
def test_dcp_round_trip(mode):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = build()
    optimizer = galore(model, MODES[mode]())
    train(model, optimizer, range(5))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    resumed = build()
    resumed.load_state_dict(model.state_dict())
    fresh = galore(resumed, MODES[mode]())
    set_optimizer_state_dict(resumed, fresh, saved)
    for m, o in ((model, optimizer), (resumed, fresh)):
        train(m, o, range(5, 12))
    assert_same(model, resumed)


@EACH
def test_a_copy_goes_on_alike(mode):
    model = build()
    optimizer = galore(model, MODES[mode]())
    train(model, optimizer, range(3))
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin, twin_optimizer)):
        train(m, o, range(3, 9))
    assert_same(model, twin)
    assert not torch.equal(model[1].weight, build()[1].weight)
