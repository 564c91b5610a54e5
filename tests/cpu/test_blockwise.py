"""Blockwise 8-bit codes: the nearest code exactly."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import lowrank_sys  # noqa: F401  registers the ops
from lowrank_sys import backends, reference
from lowrank_sys._ops.codebook import dynamic_map
from lowrank_sys.reference.blockwise import midpoints

ops = torch.ops.lowrank
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SIGNS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
NAN, INF = float("nan"), float("inf")

pytestmark = pytest.mark.skipif(bool(backends.NATIVE_MISSING), reason=f"no native build: {backends.NATIVE_MISSING}")


def bits(x):
    return x.view(torch.int32)


def same(a, b):
    """Equal bytes."""
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


# The map and its table


@SIGNS
def test_map_has_256_ascending_values(signed):
    values = dynamic_map(signed)
    assert values.dtype == torch.float32 and values.shape == (256,) and (values.diff() > 0).all()
    assert values[127 if signed else 0] == 0 and values[-1] == 1
    if signed:
        assert torch.equal(values[:127], -values[128:255].flip(0))


@SIGNS
def test_map_follows_its_definition(signed):
    """Midpoints of equal parts of [0.1, 1) 10^(i-6): fp32 roundings of the exact values, up to the sums' own rounding."""
    want = [0.0, 1.0]
    for decade in range(7):
        parts = (1 if signed else 2) << decade
        exact = [(0.1 + 0.9 * (2 * k + 1) / (2 * parts)) * 10.0 ** (decade - 6) for k in range(parts)]
        want += exact + [-x for x in exact if signed]
    want = torch.tensor(sorted(want), dtype=torch.float64)
    assert ((dynamic_map(signed) - want).abs() <= 4 * 2.0**-24 * want.abs()).all()


@SIGNS
def test_no_bin_of_sixteen_bits_has_two_midpoints(signed):
    """What lets a table entry hold the bin's only midpoint, over all bins."""
    positive = midpoints(signed)[127 if signed else 0 :]
    tops = bits(positive) >> 16
    assert len(positive) == (128 if signed else 255) and (tops.diff() > 0).all()


@SIGNS
def test_ops_have_the_map(signed):
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(ops.dequantize_blockwise(codes, torch.ones(1), signed=signed), dynamic_map(signed))
    assert torch.equal(ops.dequantize_blockwise(codes, torch.full((1,), 0.3), signed=signed), dynamic_map(signed) * 0.3)


def encode(y, signed):
    """Codes of values in [-1, 1] as they are: a 1 leads each block, so that absmax is 1."""
    rows = torch.nn.functional.pad(y, (0, -len(y) % 255)).view(-1, 255)
    rows = torch.cat([torch.ones(len(rows), 1), rows], dim=1).contiguous()
    codes, absmax = ops.quantize_blockwise(rows, signed=signed)
    assert (absmax == 1).all() and (codes[:, 0] == 255).all()
    return codes[:, 1:].reshape(-1)[: len(y)]


def nearest(y, signed):
    """The nearest code by brute force in fp64, the lower of two."""
    values = dynamic_map(signed).double()
    return torch.cat([(part.double()[:, None] - values).abs().argmin(dim=1) for part in y.split(1 << 14)])


def assert_nearest(y, signed):
    codes = encode(y, signed).long()
    between = midpoints(signed)
    assert torch.equal(codes, torch.bucketize(y, between))
    # fp32 rounds a midpoint: a value that equals it has the lower code, whichever is nearer by half a unit in the last place.
    tie = torch.isin(y, between)
    assert torch.equal(codes[~tie], nearest(y[~tie], signed))


@SIGNS
def test_nearest_code_around_every_midpoint(signed):
    between = midpoints(signed)
    up, down = torch.tensor(INF), torch.tensor(-INF)
    near = [
        between,
        between.nextafter(up),
        between.nextafter(down),
        between.nextafter(up).nextafter(up),
        between.nextafter(down).nextafter(down),
        dynamic_map(signed),
    ]
    assert_nearest(torch.cat(near), signed)
    codes = torch.arange(255)
    assert torch.equal(encode(between, signed).long(), codes)
    assert torch.equal(encode(between.nextafter(up), signed).long(), codes + 1)


@SIGNS
def test_nearest_code_in_every_bin(signed):
    """All top halves of fp32 values in [-1, 1], each with its first and last value and some between."""
    tops = torch.arange(0x3F80, dtype=torch.int32) << 16
    lows = torch.tensor([0, 1, 0x5555, 0x7FFF, 0x8000, 0xFFFF], dtype=torch.int32)
    y = (tops[:, None] | lows).view(-1).view(torch.float32)
    assert_nearest(torch.cat([y, -y] if signed else [y]), signed)


def test_an_unsigned_negative_is_zero():
    codes, absmax = ops.quantize_blockwise(torch.tensor([-2.0, 1.0, -1e-9]), signed=False)
    assert absmax == 2 and codes[0] == codes[2] == 0 and dynamic_map(False)[codes.long()][1] > 0.49


# Quantizing tensors


@SIGNS
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (7, 300), (2, 512), (3, 4, 257), (0, 5), (5, 0), (1, 1)], ids=str)
def test_by_row_is_each_row_by_itself(shape, dtype, signed):
    x = (torch.randn(shape) * torch.rand(shape).mul(12).exp2()).to(dtype)
    codes, absmax = ops.quantize_blockwise(x, signed=signed, by_row=True)
    assert codes.shape == x.shape and absmax.shape == (*shape[:-1], -(-shape[-1] // 256))
    back = ops.dequantize_blockwise(codes, absmax, signed=signed)
    for i in range(x[..., 0].numel() if x.numel() else 0):
        row, stored = x.view(-1, shape[-1])[i], (codes.view(-1, shape[-1])[i], absmax.view(-1, absmax.shape[-1])[i])
        assert all(map(same, stored, ops.quantize_blockwise(row, signed=signed)))
        assert same(back.view(-1, shape[-1])[i], ops.dequantize_blockwise(*stored, signed=signed))
    want = reference.quantize_blockwise(x, signed=signed, by_row=True)
    assert same(codes, want[0]) and same(absmax, want[1]) and absmax.shape == want[1].shape
    assert same(back, reference.dequantize_blockwise(codes, absmax, signed=signed))


@SIGNS
@pytest.mark.parametrize(
    "value, want",
    [
        (0.0, 0.0),
        (-0.0, 0.0),
        (1e-39, 0.0),
        (-1.1754942e-38, 0.0),
        (NAN, NAN),
        (INF, NAN),
        (-INF, NAN),
        (1.17549435e-38, None),
        (torch.finfo(torch.float32).max, None),
        (2.0**126, None),
    ],
)
def test_extreme_blocks(value, want, signed):
    """Each block stands alone; zeros and denormals store zeros, a block that is not finite decodes to NaN."""
    x = torch.ones(3, 256)
    x[1] = 0
    x[1, 7] = value
    codes, absmax = ops.quantize_blockwise(x, signed=signed)
    got, oracle = ops.dequantize_blockwise(codes, absmax, signed=signed), reference.quantize_blockwise(x, signed=signed)
    assert torch.equal(codes, oracle[0]) and torch.equal(absmax.nan_to_num(-1), oracle[1].nan_to_num(-1))
    assert (got[0] == 1).all() and (got[2] == 1).all()
    if want is None:
        assert got[1, 7] == absmax[1] == torch.tensor(value) and (got[1, :7] == 0).all()
    else:
        assert (codes[1] == (127 if signed else 0)).all() and torch.equal(
            got[1].nan_to_num(9), torch.full((256,), want).nan_to_num(9)
        )


@SIGNS
def test_quantizing_again_changes_nothing(signed):
    """A decoded block whose absmax has a code of its own, +absmax, encodes to its bytes."""
    x = torch.randn(100, 256) if signed else torch.rand(100, 256)
    x[:, 0] = 5
    codes, absmax = ops.quantize_blockwise(x, signed=signed)
    again = ops.quantize_blockwise(ops.dequantize_blockwise(codes, absmax, signed=signed), signed=signed)
    assert torch.equal(again[0], codes) and torch.equal(again[1], absmax)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(st.lists(st.floats(width=32), min_size=1, max_size=40), st.integers(0, 600), st.booleans(), st.integers(0, 99))
def test_any_floats(values, extra, signed, seed):
    x = torch.cat([torch.tensor(values), torch.randn(extra, generator=torch.Generator().manual_seed(seed))])
    got, want = ops.quantize_blockwise(x, signed=signed), reference.quantize_blockwise(x, signed=signed)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1].nan_to_num(-1), want[1].nan_to_num(-1))
