"""The linear layer on INT8 weights, and the random bits of stochastic rounding in a kernel."""

import itertools

import pytest
import torch
from linear_rows import BF16, FP16, FP32, SHAPES, check

from lowrank_sys import reference
from lowrank_sys._ops import workspace
from lowrank_sys.kernels import configs, traffic
from lowrank_sys.kernels.int8_linear import int8_linear, int8_linear_backward


def inputs(device, t, m, n, group_size, dtype):
    draw = torch.Generator().manual_seed(0)
    codes, scale = reference.int8.quantize_int8(torch.randn(m, n, generator=draw), group_size=group_size)
    x, dy = torch.randn(t, n, generator=draw).to(dtype), torch.randn(t, m, generator=draw).to(dtype)
    return [tensor.to(device) for tensor in (codes, scale, x, dy, torch.randn(m, generator=draw))]


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(lane, shape, dtype):
    codes, scale, x, dy, bias = inputs(lane.device, *shape, dtype)
    w = reference.int8.dequantize_int8(codes, scale, group_size=shape[3])
    for b in (None, bias, bias.to(dtype)):
        check(int8_linear(x, codes, scale, b, group_size=shape[3]), x, w.T, b)
    check(int8_linear_backward(dy, codes, scale, group_size=shape[3]), dy, w, None)


def test_exact_products(lane):
    """Small integers and scales that are powers of two: every product and sum is exact, so no scale may be misplaced."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(-15, 16, (48, 320), generator=draw, dtype=torch.int8).to(lane.device)
    scale = (2.0 ** torch.randint(-3, 4, (48, 10), generator=draw)).to(lane.device)
    w = reference.int8.dequantize_int8(codes, scale, group_size=32)
    for dtype in (FP32, BF16):
        x, dy = (torch.randint(-2, 3, (40, size), generator=draw).to(lane.device, dtype) for size in (320, 48))
        assert torch.equal(int8_linear(x, codes, scale, group_size=32), (x.float() @ w.T).to(dtype))
        assert torch.equal(int8_linear_backward(dy, codes, scale, group_size=32), (dy.float() @ w).to(dtype))


@pytest.mark.parametrize("lead", [(), (2, 3), (0,), (2, 0)], ids=str)
def test_leading_dimensions(lane, lead):
    codes, scale, *_ = inputs(lane.device, 1, 24, 40, 32, FP32)
    x = torch.randn(*lead, 40, device=lane.device)
    y = int8_linear(x, codes, scale, group_size=32)
    assert y.shape == (*lead, 24)
    lane.assert_close("y", y, reference.int8.int8_linear(x.double(), codes, scale, group_size=32), rtol=1e-6, atol=1e-4)


def test_a_scale_that_is_not_finite_stays_in_its_row(lane):
    codes, scale, x, dy, _ = inputs(lane.device, 5, 24, 96, 32, FP32)
    scale[3, 2] = torch.nan
    y, dx = int8_linear(x, codes, scale, group_size=32), int8_linear_backward(dy, codes, scale, group_size=32)
    assert y[:, 3].isnan().all() and y.isnan().sum() == 5
    assert dx[:, 64:].isnan().all() and dx.isnan().sum() == 5 * 32


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("shape", [(70, 33, 50, 32), (130, 144, 160, 64), (70, 48, 1616, 256), (40, 1601, 33, 32)], ids=str)
def test_traffic(lane, meter, shape, dtype):
    t, m, n, group_size = shape
    codes, scale, x, dy, bias = inputs(lane.device, *shape, dtype)
    int8_linear(x, codes, scale, bias, group_size=group_size)
    int8_linear_backward(dy, codes, scale, group_size=group_size)
    card = configs.target(lane.device)
    for launch, back in zip(meter.launches, (False, True), strict=True):
        want = traffic.int8_linear(t, m, n, back=back, dtype=dtype, group_size=group_size, card=card, bias=None if back else FP32)
        assert {name: meter.bytes(launch, name) for name in want} == want


def test_a_split_sum_is_the_whole_sum(lane):
    """Exact products, summed in parts by programs of several tiles: no part is lost, none counted twice, and a second call on
    the same memory gives the same."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(-15, 16, (48, 1600), generator=draw, dtype=torch.int8).to(lane.device)
    scale = (2.0 ** torch.randint(-3, 4, (48, 50), generator=draw)).to(lane.device)
    bias = torch.randint(-3, 4, (48,), generator=draw).to(lane.device, FP32)
    x = torch.randint(-2, 3, (70, 1600), generator=draw).to(lane.device, FP32)
    plan = configs.plan_int8_linear(70, 48, 1600, back=False, dtype=FP32, group_size=32, card=configs.target(lane.device))
    assert plan.splits > 1 and plan.tiles > 1
    want = x @ reference.int8.dequantize_int8(codes, scale, group_size=32).T + bias
    for _ in range(2):
        assert torch.equal(int8_linear(x, codes, scale, bias, group_size=32), want)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_realistic_shapes_by_formula(dtype):
    """512 tokens through 4096 x 4096 on an A100: the codes move a quarter of what fp32 weights would, at the same tiles."""
    for back in (False, True):
        rows = traffic.int8_linear(512, 4096, 4096, back=back, dtype=dtype, group_size=256, card=configs.Target(80, 108))
        assert rows["codes"].loaded == {FP32: 8, BF16: 4}[dtype] * 4096 * 4096
        assert rows["scale"].loaded <= rows["codes"].loaded / 4


@pytest.mark.parametrize("t, splits", [(1, 4), (256, 4), (2048, 1)])
def test_few_rows_fill_an_h100(t, splits):
    """4096 x 4096 has 32 tiles of outputs: parts of sums keep 128 of 132 multiprocessors busy, and the weight is read once."""
    plan = configs.plan_int8_linear(t, 4096, 4096, back=False, dtype=BF16, group_size=256, card=configs.Target(90, 132))
    assert (plan.tiles, plan.splits) == (32 * -(-t // 256), splits)
    rows = traffic.int8_linear(t, 4096, 4096, back=False, dtype=BF16, group_size=256, card=configs.Target(90, 132))
    assert rows["codes"].loaded == 4096 * 4096 * -(-t // 256)


def test_the_parts_stay_within_the_planned_scratch():
    """On every card, for few rows and for many."""
    for arch, multiprocessors in ((80, 108), (86, 82), (90, 132), (100, 148), (120, 170)):
        for t, m, n, dtype in itertools.product((1, 60, 256, 700, 2048), (48, 1000, 4096), (4096, 11008), (BF16, FP32)):
            plan = configs.plan_int8_linear(
                t, m, n, back=False, dtype=dtype, group_size=256, card=configs.Target(arch, multiprocessors)
            )
            held = 4 * plan.splits * t * m if plan.splits > 1 else 0
            rows, codes = torch.empty(t, n, dtype=dtype, device="meta"), torch.empty(m, n, dtype=torch.int8, device="meta")
            assert held <= workspace.FORMULAS["int8_linear"](rows, codes, None, cuda=True)
