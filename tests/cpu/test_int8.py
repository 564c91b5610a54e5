"""INT8 weights: codes and random rounding exactly those of the oracle, and what the rounding promises."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import lowrank_sys  # noqa: F401  registers the ops
from lowrank_sys import backends
from lowrank_sys.reference import int8 as oracle

ops = torch.ops.lowrank
STREAM = dict(seed=3, step=5, parameter=7)

pytestmark = pytest.mark.skipif(bool(backends.NATIVE_MISSING), reason=f"no native build: {backends.NATIVE_MISSING}")


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(got, want):
    return all(
        a.dtype == b.dtype and torch.equal(a.nan_to_num(7), b.nan_to_num(7)) and torch.equal(a.isnan(), b.isnan())
        for a, b in zip(got, want)
    )


def test_a_value_is_off_by_half_a_step_at_most():
    weight = randn(16, 1000) * torch.logspace(-30, 30, 16)[:, None]
    codes, scale = ops.quantize_int8(weight)
    step = oracle.ungrouped(scale[..., None].expand(16, 4, 256), 1000)
    # Half a step, and the roundings of 1 / scale, of the quotient and of the product.
    assert ((ops.dequantize_int8(codes, scale) - weight).abs() <= step * (0.5 + 119 * 2.0**-22)).all()
    assert (oracle.grouped(codes.float(), 256).abs().amax(2) == 119).all()


def test_odd_groups_have_defined_codes():
    weight = torch.ones(1, 5 * 32)
    groups = weight.view(5, 32)
    groups[0], groups[1], groups[2, 3], groups[3, 4] = 0.0, 1e-40, torch.nan, -torch.inf
    codes, scale = ops.quantize_int8(weight, group_size=32)
    assert torch.equal(scale[0, :2], torch.zeros(2)) and scale[0, 2:4].isnan().all() and scale[0, 4] > 0
    assert not codes[0, :128].any() and (codes[0, 128:] == 119).all()
    back = ops.dequantize_int8(codes, scale, group_size=32)
    assert not back[0, :64].any() and back[0, 64:128].isnan().all()


def both(weight, group_size):
    first = ops.quantize_int8(weight, group_size=group_size)
    return first, tuple(x.clone() for x in first)


@given(
    bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=80),
    group_size=st.sampled_from([32, 64]),
    stored=st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=3),
    step=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_fuzz_of_bit_patterns(bits, stored, group_size, step):
    """Any fp32 as weight, as update and as scale, and any code, -128 and scales below 0 included."""
    x = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)[None]
    got = ops.quantize_int8(x, group_size=group_size)
    assert same(got, oracle.quantize_int8(x, group_size=group_size))
    codes = torch.tensor(bits, dtype=torch.int64).to(torch.int8)[None].contiguous()
    scale = torch.tensor(stored, dtype=torch.int64).to(torch.int32).view(torch.float32)[None, : got[1].shape[1]].contiguous()
    want = codes.clone(), scale.clone()
    ops.int8_update_(codes, scale, x, seed=0, step=step, parameter=0, group_size=group_size)
    oracle.int8_update_(*want, x, seed=0, step=step, parameter=0, group_size=group_size)
    assert same((codes, scale), want)


@functools.cache
def flat(m, n):
    """Codes from -90 to 90 with one 119 a group, so that no small step needs a new scale; scale 2⁻¹⁰."""
    codes = torch.randint(-90, 91, (m, n), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    codes[:, ::256] = 119
    return codes, torch.full((m, n // 256), 2.0**-10)


@pytest.mark.parametrize("amount", [0.25, 1 / 3, -0.01, 0.9, 2**-9, -5.75])
def test_rounding_is_unbiased(amount):
    """Over 10⁶ draws the mean error is within 4 standard errors, and every result is one of two neighbours."""
    codes, scale = (x.clone() for x in flat(512, 2048))
    before = codes.clone()
    ops.int8_update_(codes, scale, torch.full(codes.shape, amount * 2.0**-10), **STREAM)
    moved = (codes.int() - before.int()).double()
    assert set(moved.unique().tolist()) <= {math.floor(amount), math.floor(amount) + 1}
    frac = amount - math.floor(amount)
    assert abs(moved.mean() - amount) <= 4 * (frac * (1 - frac) / moved.numel()) ** 0.5 + 2.0**-17
    assert torch.equal(scale, flat(512, 2048)[1])


def test_steps_of_a_hundredth_arrive():
    """10⁴ updates of 1% of a step arrive at 100 steps within 4 standard errors, where rounding to nearest never moves."""
    codes, scale = torch.zeros(1, 512, dtype=torch.int8), torch.full((1, 2), 2.0**-10)
    codes[0, ::256] = 127
    codes[0, 1::2], codes[0, 2::256] = -50, -50
    start, step = ops.dequantize_int8(codes, scale), 0.01 * 2.0**-10
    update = torch.full((1, 512), step)
    update[0, ::256] = 0.0
    nearest = codes.float()
    for i in range(10_000):
        ops.int8_update_(codes, scale, update, seed=1, step=i, parameter=0)
        nearest = (nearest + 0.01).round()
    assert torch.equal(nearest, start / 2.0**-10)
    moved = (ops.dequantize_int8(codes, scale) - start)[0, 1:256].double() / 2.0**-10
    # 10⁴ draws of probability 1%, each of variance p (1 - p), and 2⁻¹⁷ for the fraction's 16 bits.
    error = (0.01 * 0.99 * 10_000) ** 0.5
    assert abs(moved.mean() - 100) <= 4 * error / len(moved) ** 0.5 + 10_000 * 2.0**-17
    assert (moved - 100).abs().max() <= 6 * error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_zero_update_touches_no_byte(dtype):
    """10⁸ weights, with groups far below their range, and scales that are 0, denormal, negative, huge or not finite."""
    m, n = 4096, 24576
    codes = torch.randint(-127, 128, (m, n), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(m, n // 256, generator=torch.Generator().manual_seed(1))
    codes[5] //= 20
    scale[7, :6] = torch.tensor([0.0, 1e-42, -1.0, torch.inf, torch.nan, 3e38])
    before = codes.clone(), scale.clone()
    ops.int8_update_(codes, scale, torch.zeros(m, n, dtype=dtype), alpha=-3.0, **STREAM)
    assert m * n >= 10**8 and torch.equal(codes, before[0])
    assert torch.equal(scale.view(torch.int32), before[1].view(torch.int32))


@pytest.mark.parametrize("size", [torch.sign, torch.Tensor.clone], ids=["one step", "normal"])
def test_few_groups_are_rescaled(size):
    """Fewer than 2% of the groups at updates of one step, at every one of 40 updates; a fresh scale would change them all."""
    codes, scale = ops.quantize_int8(0.02 * randn(128, 8192))
    for i in range(40):
        step = oracle.ungrouped(scale[..., None].expand(128, 32, 256), 8192)
        before = scale.clone()
        ops.int8_update_(codes, scale, size(randn(128, 8192, seed=100 + i)) * step, seed=0, step=i, parameter=0)
        assert (scale != before).double().mean() < 0.02
    assert (scale != ops.quantize_int8(ops.dequantize_int8(codes, scale))[1]).double().mean() > 0.9


def test_nothing_is_clamped():
    """A value that does not fit gives its group a new scale, with headroom; a group under half of its range a finer one."""
    codes, scale = ops.quantize_int8(torch.linspace(-1, 1, 256)[None])
    old = scale.item()
    update = torch.zeros(1, 256)
    update[0, 9] = 5.0
    ops.int8_update_(codes, scale, update, **STREAM)
    want = torch.linspace(-1, 1, 256)
    want[9] += 5.0
    assert scale.item() == pytest.approx(want[9].item() / 119, rel=0.01)
    assert codes[0, 9] in (118, 119, 120) and (ops.dequantize_int8(codes, scale)[0] - want).abs().max() <= old + scale.item()
    grown = scale.item()
    ops.int8_update_(codes, scale, torch.zeros(1, 256), decay=0.6, seed=1, step=1, parameter=1)
    assert scale.item() == grown  # 71 of 127 is more than half
    ops.int8_update_(codes, scale, torch.zeros(1, 256), decay=0.6, seed=1, step=2, parameter=1)
    assert scale.item() < 0.5 * grown and codes.abs().max() in (118, 119, 120)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_an_update_that_is_not_finite_is_left_out(bad):
    weight = randn(4, 512)
    got, want = both(weight, 256)
    update = 0.01 * randn(4, 512, seed=1)
    mask = torch.zeros(4, 512, dtype=torch.bool)
    mask[1, [0, 7, 300, 511]] = True
    before = got[0][mask].clone()
    ops.int8_update_(*got, update.masked_fill(mask, bad), **STREAM)
    ops.int8_update_(*want, update.masked_fill(mask, 0.0), **STREAM)
    assert same(got, want) and torch.equal(got[0][mask], before)
    # In a group that needs a new scale it keeps its value to one step.
    value = ops.dequantize_int8(*got)[mask]
    update[:, ::2] = 30.0
    ops.int8_update_(*got, update.masked_fill(mask, bad), **STREAM)
    assert ((ops.dequantize_int8(*got)[mask] - value).abs() <= 40 / 119).all()
    # Nothing finite, nothing changes.
    before = [x.clone() for x in got]
    ops.int8_update_(*got, torch.full_like(update, bad), **STREAM)
    ops.int8_update_(*got, update, alpha=torch.tensor(bad), decay=torch.tensor(1.0), seed=1, step=torch.tensor(1), parameter=1)
    ops.int8_update_(*got, update, alpha=torch.tensor(1.0), decay=torch.tensor(bad), seed=1, step=torch.tensor(1), parameter=1)
    assert same(got, before)


def test_a_result_that_overflows_is_left_out():
    codes, scale = ops.quantize_int8(torch.full((1, 32), 3e38), group_size=32)
    update = torch.zeros(1, 32)
    update[0, :2] = torch.tensor([3e38, -3e38])
    ops.int8_update_(codes, scale, update, group_size=32, **STREAM)
    assert codes[0, 0] == 119 and codes[0, 1] == 0 and scale[0, 0] == pytest.approx(3e38 / 119)


@pytest.mark.parametrize("n", [40, 300], ids=["aligned", "odd"])
def test_shards_and_threads_draw_the_same_bits(n):
    whole = ops.quantize_int8(randn(64, n), group_size=32)
    parts = [[x[a:b].clone() for x in whole] for a, b in ((0, 13), (13, 14), (14, 64))]
    threaded = [x.clone() for x in whole]
    update = 0.01 * randn(64, n, seed=1)
    ops.int8_update_(*whole, update, **STREAM, group_size=32)
    row = 0
    for part in parts:
        rows = len(part[0])
        ops.int8_update_(*part, update[row : row + rows].contiguous(), **STREAM, offset=row * n, group_size=32)
        row += rows
    assert same([torch.cat(x) for x in zip(*parts)], whole)
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    big = [torch.cat([x] * 40) for x in threaded]
    ops.int8_update_(*big, update.repeat(40, 1), **STREAM, group_size=32)
    torch.set_num_threads(before)
    assert same([x[:64] for x in big], whole)


def test_seed_step_and_parameter_count():
    update = 0.01 * randn(4, 256, seed=1)
    results = []
    for change in ({}, dict(seed=2**32 + 3), dict(seed=-3), dict(step=6), dict(parameter=8), dict(offset=1024)):
        got = ops.quantize_int8(randn(4, 256))
        ops.int8_update_(*got, update, **STREAM | change)
        results.append(got[0])
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


def test_linear_gradients():
    weight = ops.quantize_int8(randn(40, 100))
    dense = ops.dequantize_int8(*weight)
    x, bias = randn(2, 7, 100, seed=1).requires_grad_(), randn(40, seed=2).requires_grad_()
    y = ops.int8_linear(x, *weight, bias)
    (y.square().sum() + y[0, 0, 0]).backward()
    got = x.grad, bias.grad
    x.grad = bias.grad = None
    y = torch.nn.functional.linear(x, dense, bias)
    (y.square().sum() + y[0, 0, 0]).backward()
    for a, b in zip(got, (x.grad, bias.grad)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-3)
    # An expanded gradient; x that needs none; a bias of another type.
    half = bias.detach().bfloat16().requires_grad_()
    ops.int8_linear(x.detach(), *weight, half).sum().backward()
    assert torch.equal(half.grad, torch.full((40,), 14.0, dtype=torch.bfloat16))


def test_linear_of_odd_scales_is_nan_where_they_are():
    codes, scale = ops.quantize_int8(randn(4, 64), group_size=32)
    scale[2, 1] = torch.nan
    y = ops.int8_linear(torch.ones(3, 64), codes, scale, group_size=32)
    assert y[:, 2].isnan().all() and y[:, [0, 1, 3]].isfinite().all()


def call_update(**change):
    args = dict(zip(("codes", "scale"), ops.quantize_int8(randn(6, 300)))) | dict(update=randn(6, 300)) | STREAM | change
    return "int8_update_", args


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 2**64])
def test_a_seed_has_64_bits(seed):
    name, args = call_update(seed=seed)
    before = args["codes"].clone()
    with pytest.raises((RuntimeError, OverflowError, TypeError)):
        getattr(ops, name)(**args)
    assert torch.equal(args["codes"], before)


def test_opcheck_of_gradients():
    weight = ops.quantize_int8(randn(8, 300))
    torch.library.opcheck(ops.int8_linear.default, (randn(2, 3, 300).requires_grad_(), *weight, randn(8).requires_grad_()))


def test_compiled_training_step():
    """Forward, backward and update in one graph, with no recompilation as step and rate change."""

    def train(codes, scale, x, alpha, step):
        y = ops.int8_linear(x, codes, scale)
        update = y.detach().T @ x.detach()
        ops.int8_update_(codes, scale, update, alpha=alpha, decay=alpha * 0 + 1, seed=1, step=step, parameter=0)
        return y

    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(train, fullgraph=True, backend=counter)
    results = []
    for function in (compiled, train):
        weight = ops.quantize_int8(randn(16, 300))
        outputs = [function(*weight, randn(4, 300, seed=i), torch.tensor(-1e-3 / (i + 1)), torch.tensor(i)) for i in range(5)]
        results.append([*weight, outputs[-1]])
    assert counter.frame_count == 1
    assert all(map(torch.equal, *results))


def test_a_product_takes_no_memory_of_the_size_of_the_weight():
    """Whatever torch allocates during a product, by its profiler: a panel, and the result."""
    weight = torch.zeros(4096, 4096, dtype=torch.int8), torch.ones(4096, 16)
    x = randn(8, 4096)
    for product in (ops.int8_linear, ops.int8_linear_backward):
        with torch.profiler.profile(profile_memory=True) as profile:
            product(x, *weight)
        allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
        assert 0 < allocated < 4096 * 4096
