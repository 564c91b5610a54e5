"""Steps on 8-bit moments against the oracle."""

import pytest
import torch
from cases.case import replace
from threads import threads

import lowrank_sys  # noqa: F401  registers the ops
from lowrank_sys import backends, reference
from lowrank_sys.reference.blockwise import dynamic_map

ops = torch.ops.lowrank
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
ADAM = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
LOW_RANK = dict(**ADAM, scale=0.25)
NAN, INF = float("nan"), float("inf")

pytestmark = pytest.mark.skipif(bool(backends.NATIVE_MISSING), reason=f"no native build: {backends.NATIVE_MISSING}")


def same(a, b):
    """Equal bytes."""
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def stored(shape, seed=0, by_row=False):
    """exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax; second moments away from 0, where the update is well conditioned."""
    draw = torch.Generator().manual_seed(seed)
    m, m_absmax = ops.quantize_blockwise(torch.randn(shape, generator=draw), signed=True, by_row=by_row)
    v, v_absmax = ops.quantize_blockwise(torch.rand(shape, generator=draw) + 0.1, signed=False, by_row=by_row)
    return [m, v, m_absmax, v_absmax]


def decoded(moments):
    return (
        ops.dequantize_blockwise(moments[0], moments[2], signed=True),
        ops.dequantize_blockwise(moments[1], moments[3], signed=False),
    )


def assert_neighbours(got, want, error=2.0**-21):
    """Codes that differ are neighbours, and only of values within `error` absmax of a midpoint: a bounded share of them."""
    for i, codes in enumerate(zip(got[:2], want[:2])):
        difference = (codes[0].int() - codes[1].int()).abs()
        assert difference.max().item() <= 1 if difference.numel() else True, f"moment {i}: codes differ by {difference.max()}"
        # 255 midpoints, each with a share of 2 error of the values around it if they fill [0, 1] evenly; twice that and a few.
        assert (difference != 0).sum() <= 2 * 255 * 2 * error * difference.numel() + 3, f"moment {i}"
    for a, b in zip(got[2:], want[2:]):
        assert torch.allclose(a, b, rtol=4 * error, atol=0)


def test_adam_8bit_is_exact_in_fp32():
    """The decoded state, adam in fp32 step by step, encoded again: the oracle in fp32 gives neighbours at most, and few."""
    w, g = torch.randn(4096), torch.randn(4096)
    got, want = [w.clone(), *stored(w.shape)], [w.clone(), *stored(w.shape)]
    steps = [torch.tensor(0.0), torch.tensor(0.0)]
    for _ in range(5):
        ops.adam_8bit_([got[0]], [g], *[[x] for x in got[1:]], [steps[0]], lr=torch.tensor(0.01), **ADAM)
        reference.adam_8bit_([want[0]], [g], *[[x] for x in want[1:]], [steps[1]], lr=torch.tensor(0.01), **ADAM)
    assert_neighbours(got[1:], want[1:])
    assert torch.allclose(got[0], want[0], rtol=0, atol=5 * 0.01 * 2.0**-8)  # a neighbouring code now and then


def test_a_block_of_skipped_elements_keeps_its_bytes():
    w, g, moments = torch.randn(5, 256), torch.randn(5, 256), stored((5, 256))
    g[1], g[3] = NAN, 1e30
    moments[0][1] = 0  # -0.993 absmax at most: encoding again would rescale the block
    before = replace([w, *moments], torch.clone)
    skipped = torch.tensor(0)
    ops.adam_8bit_([w], [g], *[[x] for x in moments], [torch.tensor(0.0)], lr=torch.tensor(0.1), **ADAM, skipped=skipped)
    assert skipped == 512
    for now, then in zip([w, *moments], before):
        assert same(now[[1, 3]], then[[1, 3]])
        assert all((now[i] != then[i]).any() for i in (0, 2, 4))


def test_many_steps_stay_near_adamw():
    """300 steps on a noisy quadratic: 8-bit moments reach the loss of fp32 ones within 2%."""
    losses = []
    for eight in (True, False):
        torch.manual_seed(0)
        target, w, step = torch.randn(64, 128), torch.zeros(64, 128), torch.tensor(0.0)
        moments = [torch.zeros(w.shape, dtype=torch.uint8)] * 2 if eight else []
        moments = [x.clone() for x in moments] + [torch.zeros(32) if eight else torch.zeros_like(w) for _ in range(2)]
        for _ in range(300):
            g = w - target + 0.3 * torch.randn(w.shape)
            op = ops.adam_8bit_ if eight else ops.adamw_step
            op([w], [g], *[[x] for x in moments], [step], lr=torch.tensor(0.02), **(ADAM | {"weight_decay": 0.0}))
        losses.append((w - target).square().mean().item())
    assert losses[0] <= 1.02 * losses[1] + 1e-3


def low_rank_inputs(m, n, r, left, dtype=torch.float32, seed=0):
    """param, grad, basis and the moments of one matrix."""
    draw = torch.Generator().manual_seed(seed)
    d, shape = (m, (r, n)) if left else (n, (m, r))
    return [
        torch.randn(m, n, generator=draw).to(dtype),
        torch.randn(m, n, generator=draw).to(dtype),
        (torch.randn(d, r, generator=draw) / max(d, 1) ** 0.5).to(dtype),
        *stored(shape, seed, by_row=True),
    ]


@SIDES
def test_a_step_is_its_three_parts(left):
    """project, adam_8bit_low_rank_, back_project_: the same bytes."""
    whole, parts = (low_rank_inputs(63, 100, 7, left) for _ in range(2))
    hyper = dict(beta1=0.9, beta2=0.999, eps=1e-8)
    ops.galore_step_8bit(*whole, step=3, lr=0.1, **LOW_RANK, left=left)
    r = ops.project(parts[1], parts[2], left=left)
    x = torch.empty_like(r)
    ops.adam_8bit_low_rank_([r], [x], *[[y] for y in parts[3:]], [torch.tensor(3.0)], **hyper, left=left)
    ops.back_project_(parts[0], x, parts[2], alpha=-0.1 * 0.25, beta=1 - 0.1 * 0.1, left=left)
    for a, b in zip(whole[3:], parts[3:]):
        assert same(a, b)
    assert torch.allclose(whole[0], parts[0], rtol=2.0**-22, atol=1e-7)


@SIDES
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bad_channels_keep_weights_and_decoded_moments(dtype, left):
    """R is (30, 600) or (600, 30): blocks span columns, and some consist of bad channels only."""
    got = low_rank_inputs(130, 600, 30, left, dtype) if left else low_rank_inputs(600, 130, 30, left, dtype)
    grad = got[1] if left else got[1].T
    bad = torch.zeros(600, dtype=torch.bool)
    bad[[3, 10, *range(250, 520)]] = True
    grad[5, bad] = NAN
    before, want = replace(got, torch.clone), replace(got[:3], torch.Tensor.double) + replace(got[3:], torch.clone)
    step, skipped = torch.tensor(4.0), torch.tensor(7)
    ops.galore_step_8bit(*[[x] for x in got], [step], lr=torch.tensor(0.1), **LOW_RANK, left=left, skipped=skipped)
    assert skipped == 7 + int(bad.sum()) * got[0].shape[0 if left else 1]
    pick = (lambda x, keep: x[:, keep]) if left else (lambda x, keep: x[keep])
    assert same(pick(got[0], bad), pick(before[0], bad))
    reference.named("galore_step_8bit")(*want, step=5, lr=0.1, **LOW_RANK, left=left)
    assert_neighbours(got[3:], want[3:], error=2.0**-17)
    assert torch.allclose(got[0].double(), want[0], rtol=4 * ROUNDING[dtype], atol=1e-5, equal_nan=True)
    # A decoded moment of a bad channel moves by half a gap of its block's new absmax at most.
    flags = (bad if left else bad[:, None]).expand(got[3].shape)
    for now, then, signed, absmax in zip(decoded(got[3:]), decoded(before[3:]), (True, False), got[5:]):
        gap = dynamic_map(signed).diff().max() / 2
        allowed = gap * absmax.repeat_interleave(256, dim=1)[:, : flags.shape[1]] * 1.001
        assert ((now - then).abs() <= allowed)[flags].all()
    for i in (3, 4):  # columns 256 ... 511 are a whole block, and so is a row of 30
        whole, block = (slice(None), slice(256, 512)) if left else bad, (slice(None), 1) if left else bad
        assert torch.equal(got[i][whole], before[i][whole]) and torch.equal(got[i + 2][block], before[i + 2][block])


@SIDES
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_update_of_a_bad_channel_is_nan(dtype, left):
    shape = (7, 130) if left else (130, 7)
    r, update = torch.randn(shape), torch.zeros(shape, dtype=dtype)
    (r if left else r.T)[2, 9] = 2.0**64
    ops.adam_8bit_low_rank_(
        [r], [update], *[[x] for x in stored(shape, by_row=True)], [torch.tensor(1.0)], beta1=0.9, beta2=0.999, eps=1e-8, left=left
    )
    update = update if left else update.T
    assert update[:, 9].isnan().all() and update.isnan().sum() == 7


def test_fresh_state_is_zeros():
    """Zero bytes are a zero state: the first update is that of Adam."""
    w, g = torch.zeros(1000), torch.randn(1000)
    moments = [torch.zeros(1000, dtype=torch.uint8), torch.zeros(1000, dtype=torch.uint8), torch.zeros(4), torch.zeros(4)]
    ops.adam_8bit_([w], [g], *[[x] for x in moments], [torch.tensor(0.0)], lr=torch.tensor(0.5), **ADAM)
    assert torch.allclose(w, -0.5 * g.sign(), atol=1e-4)


def test_no_thread_count_changes_the_bits():
    results = []
    for count in (1, 2, 5):
        with threads(count):
            got = low_rank_inputs(300, 700, 40, True)
            got[1][5, 9] = NAN
            w, g = torch.randn(70000, generator=torch.Generator().manual_seed(1)), got[1].view(-1)[:70000]
            moments = stored(w.shape)
            ops.adam_8bit_([w], [g], *[[x] for x in moments], [torch.tensor(0.0)], lr=torch.tensor(0.1), **ADAM)
            low = torch.randn(40, 700, generator=torch.Generator().manual_seed(2))
            low[3, 5] = INF
            ops.adam_8bit_low_rank_(
                [low], [low], *[[x] for x in got[3:]], [torch.tensor(1.0)], beta1=0.9, beta2=0.999, eps=1e-8, left=True
            )
            results.append([w, *moments, low, *got[3:]])
    for other in results[1:]:
        assert all(map(same, results[0], other))
