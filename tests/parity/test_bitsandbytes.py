"""8-bit Adam beside bitsandbytes on the CPU: the same map, states that move both ways, and steps that agree.

bitsandbytes looks codes up in a grid of 65536 points over [-1, 1], so a value goes to a code that is nearest to a point up to one
grid step (2/65535) away: the codes of both may differ where that reaches over midpoints, most of all near zero. It is no oracle of
codes: tests/cpu has an exact one.
"""

import pytest
import torch

from lowrank_sys._ops.codebook import dynamic_map
from lowrank_sys.optim.bitsandbytes import from_bitsandbytes, to_bitsandbytes

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the peer bitsandbytes is not installed")

ops = torch.ops.lowrank
SHAPE = (100, 131)  # the last block is short
HYPER = dict(lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
GRID = 2 / 65535
SIGNS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def peer(param):
    return bitsandbytes.optim.AdamW8bit([param], **HYPER)


def our_step(param, grad, state):
    ops.adam_8bit_(
        [param],
        [grad],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [state["exp_avg_absmax"]],
        [state["exp_avg_sq_absmax"]],
        [state["step"]],
        lr=torch.tensor(HYPER["lr"]),
        beta1=HYPER["betas"][0],
        beta2=HYPER["betas"][1],
        eps=HYPER["eps"],
        weight_decay=HYPER["weight_decay"],
    )


def decoded(state):
    """Both moments of one of our states."""
    return [
        ops.dequantize_blockwise(state[name], state[f"{name}_absmax"], signed=signed)
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False))
    ]


def their_decoded(state):
    return [
        bitsandbytes.functional.dequantize_blockwise(
            state[f"state{i}"], absmax=state[f"absmax{i}"], code=state[f"qmap{i}"], blocksize=256
        )
        for i in (1, 2)
    ]


def assert_codes_agree(ours, theirs, signed):
    """Neighbouring codes, or values within a grid step on each side of the same value."""
    apart = (ours.int() - theirs.int()).abs()
    values = dynamic_map(signed)
    near = (values[ours.long()] - values[theirs.long()]).abs() <= 2 * GRID
    assert ((apart <= 1) | near).all(), f"codes {apart.max()} apart"


def trained(steps=4, seed=0):
    """A parameter and the peer's optimizer after some steps."""
    torch.manual_seed(seed)
    param = torch.nn.Parameter(torch.randn(SHAPE))
    optimizer = peer(param)
    for _ in range(steps):
        param.grad = torch.randn(SHAPE)
        optimizer.step()
    return param, optimizer


@SIGNS
def test_the_map_is_the_peers(signed):
    assert torch.equal(dynamic_map(signed), bitsandbytes.functional.create_dynamic_map(signed))


@SIGNS
def test_codes_agree(signed):
    torch.manual_seed(0)
    x = torch.randn(100, 256) if signed else torch.randn(100, 256).square()
    codes, absmax = ops.quantize_blockwise(x, signed=signed)
    theirs, state = bitsandbytes.functional.quantize_blockwise(x, code=dynamic_map(signed), blocksize=256)
    assert torch.equal(absmax, state.absmax)
    assert_codes_agree(codes, theirs, signed)
    # Ours are never farther from x.
    ours = (ops.dequantize_blockwise(codes, absmax, signed=signed) - x).abs().double()
    other = (ops.dequantize_blockwise(theirs, absmax, signed=signed) - x).abs().double()
    assert (ours <= other + 2.0**-22 * absmax[:, None]).all() and ours.sum() < other.sum()


def test_a_state_of_the_peer_decodes_to_the_same_moments():
    param, optimizer = trained()
    theirs = optimizer.state[param]
    ours = from_bitsandbytes(theirs)
    assert ours["exp_avg"].dtype == torch.uint8 and ours["step"] == 4 and ours["step"].dtype == torch.float32
    for a, b in zip(decoded(ours), their_decoded(theirs)):
        assert torch.equal(a, b)


def assert_updates_agree(ours, theirs, before):
    """From the same state: fp32 arithmetic in another order. The update is m/c1 / (sqrt(v/c2) + eps)."""
    update = (theirs - before).abs()
    assert ((ours - theirs).abs() <= 1e-5 * update + 2.0**-22 * before.abs()).all()


def test_the_next_step_agrees():
    param, optimizer = trained()
    ours, before, grad = from_bitsandbytes(optimizer.state[param]), param.detach().clone(), torch.randn(SHAPE)
    weight = before.clone()
    our_step(weight, grad, ours)
    param.grad = grad
    optimizer.step()
    assert_updates_agree(weight, param.detach(), before)
    theirs = from_bitsandbytes(optimizer.state[param])
    assert theirs["step"] == ours["step"] == 5
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        assert torch.allclose(ours[f"{name}_absmax"], theirs[f"{name}_absmax"], rtol=1e-6, atol=0)
        assert_codes_agree(ours[name], theirs[name], signed)


def test_the_peer_continues_from_ours():
    torch.manual_seed(1)
    weight = torch.randn(SHAPE)
    ours = {
        "exp_avg": torch.zeros(SHAPE, dtype=torch.uint8),
        "exp_avg_sq": torch.zeros(SHAPE, dtype=torch.uint8),
        "exp_avg_absmax": torch.zeros(52),
        "exp_avg_sq_absmax": torch.zeros(52),
        "step": torch.tensor(0.0),
    }
    for _ in range(3):
        our_step(weight, torch.randn(SHAPE), ours)
    param = torch.nn.Parameter(weight.clone())
    optimizer = peer(param)
    saved = optimizer.state_dict()
    saved["state"] = {0: to_bitsandbytes(ours)}
    optimizer.load_state_dict(saved)
    for a, b in zip(decoded(ours), their_decoded(optimizer.state[param])):
        assert torch.equal(a, b)
    before, grad = weight.clone(), torch.randn(SHAPE)
    param.grad = grad
    optimizer.step()
    our_step(weight, grad, ours)
    assert optimizer.state[param]["step"] == 4
    assert_updates_agree(weight, param.detach(), before)


def test_there_and_back_is_the_same_state():
    param, optimizer = trained()
    theirs = dict(optimizer.state[param])
    again = to_bitsandbytes(from_bitsandbytes(theirs))
    for key, value in again.items():
        assert torch.equal(value, theirs[key]) if isinstance(value, torch.Tensor) else value == theirs[key], key
        assert not isinstance(value, torch.Tensor) or value.data_ptr() != theirs[key].data_ptr()


def test_small_tensors_stay_in_fp32():
    param = torch.nn.Parameter(torch.randn(30))
    optimizer = peer(param)
    param.grad = torch.randn(30)
    optimizer.step()
    ours = from_bitsandbytes(optimizer.state[param])
    assert set(ours) == {"exp_avg", "exp_avg_sq", "step"} and ours["exp_avg"].dtype == torch.float32
    back = to_bitsandbytes(ours)
    assert torch.equal(back["state2"], optimizer.state[param]["state2"]) and back["step"] == 1


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("state2"), "state2 must be a uint8 or float32 tensor, got NoneType"),
        (lambda s: s.update(state1=s["state1"].double()), "state1 must be a uint8 or float32 tensor, got torch.float64"),
        (lambda s: s.update(absmax1=s["absmax1"][:7]), r"absmax1 must be float32 of shape \(52,\), .* got \(7,\)"),
        (lambda s: s.pop("absmax2"), "absmax2 must be float32 .* got none"),
        (lambda s: s.update(qmap2=s["qmap1"]), "qmap2 is not the dynamic map of unsigned values"),
    ],
)
def test_other_states_are_refused(change, message):
    param, optimizer = trained(steps=1)
    state = dict(optimizer.state[param])
    change(state)
    with pytest.raises(ValueError, match=message):
        from_bitsandbytes(state)


def test_trajectories_stay_close():
    """Each from its own state for 50 steps of one run's gradients: the weights part by less than a tenth of the way gone."""
    torch.manual_seed(2)
    start = torch.randn(SHAPE)
    param, weight = torch.nn.Parameter(start.clone()), start.clone()
    optimizer, ours = peer(param), None
    for _ in range(50):
        grad = param.detach() - 1 + 0.5 * torch.randn(SHAPE)
        param.grad = grad
        if ours is None:
            ours = {
                "exp_avg": torch.zeros(SHAPE, dtype=torch.uint8),
                "exp_avg_sq": torch.zeros(SHAPE, dtype=torch.uint8),
                "exp_avg_absmax": torch.zeros(52),
                "exp_avg_sq_absmax": torch.zeros(52),
                "step": torch.tensor(0.0),
            }
        our_step(weight, grad, ours)
        optimizer.step()
    assert (weight - param.detach()).norm() <= 0.1 * (param.detach() - start).norm()
