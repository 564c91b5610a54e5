"""INT4 codes on real threads: those of the op, to the bit, for every number of threads."""

import pytest
import torch

_host = pytest.importorskip("lowrank_sys._host", reason="lowrank_sys._host is built by an editable install")


def array(tensor):
    """numpy view; bfloat16 and float16 as their bits."""
    return tensor.numpy() if tensor.dtype == torch.float32 else tensor.view(torch.uint16).numpy()


def poisoned(d, r, dtype):
    """Normal values, a NaN, an infinity and a denormal."""
    basis = torch.randn(d, r, generator=torch.Generator().manual_seed(1))
    if basis.numel() > 4:
        basis.view(-1)[[3, -1, -4]] = torch.tensor([torch.nan, torch.inf, 1e-40])
    return basis.to(dtype)


def assert_same_bits(got, want, threads):
    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)), threads


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("d, r, group_size", [(515, 35, 256), (64, 64, 32), (33, 3, 1024), (1, 1, 64), (1056, 33, 512)])
def test_codes_are_those_of_the_op(d, r, group_size, dtype):
    basis = poisoned(d, r, dtype)
    want = torch.ops.lowrank.quantize_int4(basis, group_size=group_size)
    values = torch.ops.lowrank.dequantize_int4(*want, d=d, group_size=group_size)
    for threads in (1, 32, 256):
        got = [torch.empty_like(x) for x in want]
        _host.quantize_int4(threads, array(basis), str(dtype).removeprefix("torch."), *(x.numpy() for x in got), group_size)
        for a, b in zip(got, want):
            assert_same_bits(a, b, threads)
        back = torch.empty(d, r)
        _host.dequantize_int4(threads, *(x.numpy() for x in got), group_size, back.numpy())
        assert_same_bits(back, values, threads)
