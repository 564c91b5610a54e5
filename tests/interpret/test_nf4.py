"""The linear layer on NF4 weights: the oracle, levels in their places, and the traffic of its formula."""

import pytest
import torch
from linear_rows import BF16, FP16, FP32, SHAPES, check

from lowrank_sys import reference
from lowrank_sys.kernels import configs, traffic
from lowrank_sys.kernels.int8_linear import nf4_linear, nf4_linear_backward


def inputs(device, t, m, n, group_size, dtype):
    draw = torch.Generator().manual_seed(0)
    packed, absmax = reference.quantize_nf4(torch.randn(m, n, generator=draw), group_size=group_size)
    x, dy = torch.randn(t, n, generator=draw).to(dtype), torch.randn(t, m, generator=draw).to(dtype)
    return [tensor.to(device) for tensor in (packed, absmax, x, dy, torch.randn(m, generator=draw))]


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(lane, shape, dtype):
    n, group_size = shape[2:]
    packed, absmax, x, dy, bias = inputs(lane.device, *shape, dtype)
    w = reference.dequantize_nf4(packed, absmax, n=n, group_size=group_size)
    for b in (None, bias.to(dtype)):
        check(nf4_linear(x, packed, absmax, b, group_size=group_size), x, w.T, b)
    check(nf4_linear_backward(dy, packed, absmax, n=n, group_size=group_size), dy, w, None)


@pytest.mark.parametrize("n", [160, 161])
def test_every_code_at_every_place(lane, n):
    """By unit vectors, forward and backward: the bits of the oracle's weight, whichever the nibble, the group and the row."""
    draw = torch.Generator().manual_seed(0)
    packed = torch.randint(256, (33, (n + 1) // 2), generator=draw, dtype=torch.uint8).to(lane.device)
    absmax = torch.randn(33, -(-n // 32), generator=draw).to(lane.device)
    w = reference.dequantize_nf4(packed, absmax, n=n, group_size=32)
    assert torch.equal(nf4_linear(torch.eye(n, device=lane.device), packed, absmax, group_size=32), w.T)
    assert torch.equal(nf4_linear_backward(torch.eye(33, device=lane.device), packed, absmax, n=n, group_size=32), w)


@pytest.mark.parametrize("lead", [(), (2, 3), (0,), (2, 0)], ids=str)
def test_leading_dimensions(lane, lead):
    packed, absmax, *_ = inputs(lane.device, 1, 24, 41, 32, FP32)
    x = torch.randn(*lead, 41, device=lane.device)
    y = nf4_linear(x, packed, absmax, group_size=32)
    assert y.shape == (*lead, 24)
    lane.assert_close("y", y, reference.nf4_linear(x.double(), packed, absmax, group_size=32), rtol=1e-6, atol=1e-4)


def test_an_absmax_that_is_not_finite_stays_in_its_row(lane):
    packed, absmax, x, dy, _ = inputs(lane.device, 5, 24, 96, 32, FP32)
    absmax[3, 2] = torch.nan
    y, dx = nf4_linear(x, packed, absmax, group_size=32), nf4_linear_backward(dy, packed, absmax, n=96, group_size=32)
    assert y[:, 3].isnan().all() and y.isnan().sum() == 5
    assert dx[:, 64:].isnan().all() and dx.isnan().sum() == 5 * 32


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("shape", [(70, 33, 51, 32), (130, 144, 160, 64), (40, 1601, 33, 32)], ids=str)
def test_traffic(lane, meter, shape, dtype):
    t, m, n, group_size = shape
    packed, absmax, x, dy, bias = inputs(lane.device, *shape, dtype)
    nf4_linear(x, packed, absmax, bias, group_size=group_size)
    nf4_linear_backward(dy, packed, absmax, n=n, group_size=group_size)
    card = configs.target(lane.device)
    for launch, back in zip(meter.launches, (False, True), strict=True):
        rest = dict(dtype=dtype, group_size=group_size, card=card, bias=None if back else FP32, nf4=True)
        want = traffic.int8_linear(t, m, n, back=back, **rest)
        assert {name: meter.bytes(launch, name) for name in want} == want
