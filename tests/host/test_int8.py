"""INT8 weights on 1, 32 and 256 real threads, in steps of 1 and 8 elements: the bits of the op."""

import pytest
import torch

from lowrank_sys.reference import int8 as oracle

_host = pytest.importorskip("lowrank_sys._host", reason="lowrank_sys._host is built by an editable install")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Threads and elements at a time; a GPU's warp takes 32 and 8 where rows begin on eight elements.
BLOCKS = [(1, 1), (32, 1), (256, 1), (1, 8), (32, 8)]
ops = torch.ops.lowrank


def array(tensor):
    """numpy view; bfloat16 and float16 as their bits."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype in FLOATS[1:] else tensor.numpy()


def name(dtype):
    return str(dtype).removeprefix("torch.")


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(got, want):
    return all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(got, want))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(3, 520, 256), (2, 1031, 1024), (5, 7, 32), (4, 96, 64)], ids=str)
def test_every_block_gives_the_bits_of_the_op(shape, dtype):
    m, n, group_size = shape
    weight = randn(m, n)
    weight[0, : min(n, 300)], weight[-1, -1] = 0.0, 1e-42
    weight = weight.to(dtype)
    steps = [0.01 * randn(m, n, seed=i).to(dtype) for i in range(3)]
    steps[1].view(-1)[[0, -1]], steps[2] = torch.tensor([torch.nan, torch.inf], dtype=dtype), steps[2] * 400
    want = ops.quantize_int8(weight, group_size=group_size)
    start = [x.clone() for x in want]
    back = ops.dequantize_int8(*want, group_size=group_size, dtype=dtype)
    stream = dict(alpha=-0.5, decay=0.75, seed=2**63 - 5, parameter=9, offset=2**35 - 8, group_size=group_size)
    rescaled = []
    for i, step in enumerate(steps):
        before = want[1].clone()
        ops.int8_update_(*want, step, step=i, **stream)
        rescaled.append(int((before != want[1]).sum()))
    assert rescaled[-1] > 0
    for threads, vector in BLOCKS:
        if vector == 8 and n % 8:
            continue
        got = torch.empty(m, n, dtype=torch.int8), torch.empty_like(want[1])
        _host.quantize_int8(threads, vector, array(weight), name(dtype), *map(array, got), group_size)
        assert same(got, start), (threads, vector)
        dense = torch.empty_like(back)
        _host.dequantize_int8(threads, vector, *map(array, got), array(dense), name(dtype), group_size)
        assert same([dense], [back]), (threads, vector)
        for i, step in enumerate(steps):
            new = _host.update_int8(threads, vector, *map(array, got), array(step), name(dtype), step=i, **stream)
            assert new == rescaled[i], (threads, vector, i)
        assert same(got, want), (threads, vector)


def test_the_oracle_is_no_third_opinion():
    weight, step = randn(3, 300), 0.01 * randn(3, 300, seed=1)
    want, got = oracle.quantize_int8(weight), (torch.empty(3, 300, dtype=torch.int8), torch.empty(3, 2))
    _host.quantize_int8(32, 1, array(weight), "float32", *map(array, got), 256)
    call = dict(alpha=1.0, decay=1.0, seed=1, step=2, parameter=3, offset=4, group_size=256)
    oracle.int8_update_(*want, step, **call)
    _host.update_int8(32, 1, *map(array, got), array(step), "float32", **call)
    assert same(got, want)
