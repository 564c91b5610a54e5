"""Blockwise 8-bit codes on 1, 32 and 256 threads: the bytes of the ops, which on the CPU have 512-bit code of their own."""

import pytest
import torch

from lowrank_sys.reference.blockwise import dynamic_map, midpoints

_host = pytest.importorskip("lowrank_sys._host", reason="lowrank_sys._host is built by an editable install")
ops = torch.ops.lowrank
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HYPER = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
SIGNS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
# Threads, and how many elements a thread takes at once.
RUNS = [(1, 1), (1, 8), (32, 1), (32, 8), (256, 1)]


def name(dtype):
    return str(dtype).removeprefix("torch.")


def array(tensor):
    """numpy view; bfloat16 and float16 as their bits."""
    return tensor.numpy() if tensor.dtype in (torch.float32, torch.uint8) else tensor.view(torch.uint16).numpy()


def same(a, b):
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@SIGNS
def test_table_over_all_bins(signed):
    """Every entry holds the rank of its bin's lowest value and the bin's only midpoint."""
    values, bins = torch.empty(256), torch.empty(_host.BINS, dtype=torch.uint32)
    _host.codebook(signed=signed, values=values.numpy(), bins=bins.numpy())
    assert torch.equal(values, dynamic_map(signed))
    between = midpoints(signed)[127 if signed else 0 :].view(torch.int32).long()
    tops = _host.FIRST_BIN + torch.arange(_host.BINS)
    assert tops[-1] << 16 == torch.tensor(1.0).view(torch.int32)
    assert (between >= tops[0] << 16).all(), "values below the table are nearest to 0"
    inside = (between[None, :] >> 16) == tops[:, None]
    assert (inside.sum(dim=1) <= 1).all() and inside.sum() == len(between)
    entries = bins.long()
    assert torch.equal(entries >> 16, (between[None, :] < (tops << 16)[:, None]).sum(dim=1))
    low = torch.where(inside, between & 0xFFFF, 0).sum(dim=1)
    assert torch.equal(0xFFFF - (entries & 0xFFFF), torch.where(inside.any(dim=1), low, 0xFFFF))


@SIGNS
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(2000,), (7, 515), (20, 30), (5, 264), (1, 1000), (70, 1)], ids=str)
def test_codes_are_those_of_the_op(shape, dtype, signed):
    """Of a vector, and of a matrix by its rows."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if len(shape) == 1:
        x[256:512], x[600], x[1024:1280] = 0, torch.nan, x[1024:1280].abs() * 1e-3
    else:
        x[-1, 0] = torch.nan
    x = x.to(dtype)
    codes, absmax = ops.quantize_blockwise(x, signed=signed, by_row=len(shape) > 1)
    back = ops.dequantize_blockwise(codes, absmax, signed=signed)
    for threads, vector in RUNS:
        got = torch.empty_like(codes), torch.empty_like(absmax)
        _host.quantize_blockwise(threads, vector, array(x), name(dtype), signed, *map(array, got))
        assert same(got[0], codes) and same(got[1], absmax), (threads, vector)
        wide = torch.empty(x.shape)
        _host.dequantize_blockwise(threads, vector, array(codes), array(absmax), signed, array(wide))
        assert same(wide, back), (threads, vector)


@SIGNS
def test_every_top_half_on_one_thread(signed):
    """The scalar code of core beside the vector code of the op, for every top half of |y| <= 1 and around every midpoint."""
    tops = torch.arange(0x3F80, dtype=torch.int32) << 16
    y = (tops[:, None] | torch.tensor([0, 0x1234, 0xFFFF], dtype=torch.int32)).view(-1).view(torch.float32)
    between = midpoints(signed)
    near = [between, between.nextafter(torch.tensor(2.0)), between.nextafter(torch.tensor(-2.0))]
    y = torch.cat([y, *((-y,) if signed else ()), *near])
    y = torch.nn.functional.pad(y, (0, -len(y) % 255)).view(-1, 255)
    y = torch.cat([torch.ones(len(y), 1), y], dim=1).contiguous()
    codes, absmax = ops.quantize_blockwise(y, signed=signed)
    got = torch.empty_like(codes), torch.empty_like(absmax)
    _host.quantize_blockwise(1, 1, array(y), "float32", signed, *map(array, got))
    assert torch.equal(got[0], codes) and torch.equal(got[1], absmax)


def stored(*shape):
    """Of a matrix by row."""
    draw, by_row = torch.Generator().manual_seed(7), len(shape) > 1
    m, m_absmax = ops.quantize_blockwise(torch.randn(shape, generator=draw), signed=True, by_row=by_row)
    v, v_absmax = ops.quantize_blockwise(torch.rand(shape, generator=draw), signed=False, by_row=by_row)
    return [m, v, m_absmax, v_absmax]


@pytest.mark.parametrize("w_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("g_dtype", FLOATS, ids=str)
def test_adam_8bit_is_that_of_the_op(w_dtype, g_dtype):
    n = 256 * 5 + 77
    draw = torch.Generator().manual_seed(1)
    w, g = torch.randn(n, generator=draw).to(w_dtype), torch.randn(n, generator=draw).to(g_dtype)
    g[3], g[512:768], g[-1] = torch.nan, torch.inf, -torch.inf
    moments = stored(n)
    want = [w.clone(), *(x.clone() for x in moments)]
    step, skipped = torch.tensor(4.0), torch.tensor(0)
    ops.adam_8bit_(
        [want[0]],
        [g],
        *[[x] for x in want[1:]],
        [step],
        lr=torch.tensor(0.01),
        **HYPER,
        grad_scale=torch.tensor(0.5),
        skipped=skipped,
    )
    adam = _host.AdamStep(**HYPER, scale=1.0, lr=torch.tensor(0.01).item(), step=5.0)
    for threads, vector in RUNS:
        got = [w.clone(), *(x.clone() for x in moments)]
        left_out = _host.adam_8bit(
            threads, vector, array(got[0]), name(w_dtype), array(g), name(g_dtype), *map(array, got[1:]), 0.5, adam
        )
        assert left_out == skipped == 258
        assert all(map(same, got, want)), (threads, vector)


@pytest.mark.parametrize("bad", [True, False], ids=["bad channels", "good"])
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("shape", [(7, 515), (20, 30), (5, 264), (1, 1000), (300, 1)], ids=str)
def test_low_rank_adam_8bit_is_that_of_the_op(left, shape, bad):
    r = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    if bad:
        r.view(-1)[5], r.view(-1)[-2] = torch.nan, 2.0**66
    moments = stored(*shape)
    want, update = [x.clone() for x in moments], torch.empty(shape)
    ops.adam_8bit_low_rank_(
        [r],
        [update],
        *[[x] for x in want],
        [torch.tensor(5.0)],
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        left=left,
        grad_scale=torch.tensor(0.5),
    )
    adam = _host.AdamStep(**HYPER, scale=1.0, lr=0.0, step=5.0)
    for threads, vector in RUNS:
        got, x = [y.clone() for y in moments], torch.empty(shape)
        ok = torch.ones(shape[1 if left else 0], dtype=torch.uint8)
        _host.low_rank_adam_8bit(threads, vector, left, array(r), *map(array, got), array(x), array(ok), 0.5, adam)
        assert same(x, update) and all(map(same, got, want)), (threads, vector)
        flags = (ok == 0)[None, :] if left else (ok == 0)[:, None]
        assert torch.equal(x.isnan(), flags.expand(shape)) and bool(flags.any()) == bad
