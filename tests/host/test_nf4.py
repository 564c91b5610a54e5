"""NF4 codes on 1, 32 and 256 real threads, in steps of 1 and 8 elements: the bits of the op."""

import pytest
import torch

_host = pytest.importorskip("lowrank_sys._host", reason="lowrank_sys._host is built by an editable install")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Threads and elements at a time; a GPU's warp takes 32 and 8 where rows begin on eight elements.
BLOCKS = [(1, 1), (32, 1), (256, 1), (1, 8), (32, 8)]
ops = torch.ops.lowrank


def array(tensor):
    """numpy view; bfloat16 and float16 as their bits."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype in FLOATS[1:] else tensor.numpy()


def same(got, want):
    return torch.equal(got.nan_to_num(7), want.nan_to_num(7))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("m, n, group_size", [(3, 520, 256), (2, 1031, 1024), (5, 7, 32), (4, 96, 64)])
def test_every_block_gives_the_bits_of_the_op(m, n, group_size, dtype):
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    weight[0, : min(n, 300)], weight[-1, -1], weight[1, -1] = 0.0, 1e-42, torch.nan
    weight = weight.to(dtype)
    packed, absmax = ops.quantize_nf4(weight, group_size=group_size)
    back = ops.dequantize_nf4(packed, absmax, n=n, group_size=group_size, dtype=dtype)
    for threads, vector in BLOCKS:
        if vector == 8 and n % 8:
            continue
        got, scale, dense = torch.empty_like(packed), torch.empty_like(absmax), torch.empty_like(back)
        name = str(dtype).removeprefix("torch.")
        _host.quantize_nf4(threads, vector, array(weight), name, array(got), array(scale), group_size)
        assert torch.equal(got, packed) and same(scale, absmax), (threads, vector)
        _host.dequantize_nf4(threads, vector, array(got), array(scale), array(dense), name, group_size)
        assert same(dense, back), (threads, vector)
