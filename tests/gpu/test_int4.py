"""INT4 bases on a GPU: the CPU's codes to the bit, and products against the oracle in fp64."""

import pytest
import torch

from lowrank_sys import _ops, reference

ops = torch.ops.lowrank
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
TYPES = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def case(m, n, r, group_size, left, dtype):
    draw = torch.Generator("cuda").manual_seed(0)
    d = m if left else n
    basis = torch.randn(d, r, generator=draw, device="cuda") / d**0.5
    int4 = ops.quantize_int4(basis, group_size=group_size)
    grad = torch.randn(m, n, generator=draw, device="cuda").to(dtype)
    low_rank = torch.randn(_ops.low_rank_shape(grad, basis, left), generator=draw, device="cuda")
    return grad, low_rank, int4, ops.dequantize_int4(*int4, d=d, group_size=group_size).double()


@SIDES
@TYPES
@pytest.mark.parametrize("shape", [(700, 1500, 96, 256), (301, 257, 5, 32), (1024, 4096, 128, 64), (512, 640, 300, 1024)], ids=str)
def test_products(shape, dtype, left):
    grad, low_rank, int4, basis = case(*shape, left, dtype)
    extra = {"left": left, "group_size": shape[3]}
    want = reference.project(grad.double(), basis, left=left)
    got = ops.project_int4(grad, *int4, **extra)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(got, ops.project_int4(grad, *int4, **extra))
    param = grad.clone()
    want = param.double()
    reference.back_project_(want, low_rank.double(), basis, alpha=-0.5, beta=0.75, left=left)
    ops.back_project_int4_(param, low_rank, *int4, alpha=-0.5, beta=0.75, **extra)
    torch.testing.assert_close(param.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-5)


@SIDES
def test_no_synchronisation_and_no_basis_in_fp32(left):
    grad, low_rank, int4, basis = case(4096, 4096, 1024, 256, left, torch.bfloat16)

    def everything():
        ops.project_int4(grad, *int4, left=left)
        ops.back_project_int4_(grad, low_rank, *int4, left=left)

    everything()
    del basis
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # R, and partial sums of at most an eighth of G; the basis in fp32 would be 16 MiB more.
    allowed = 4 * low_rank.numel() + grad.nbytes // 8 + 2**20
    assert torch.cuda.max_memory_allocated() - before <= allowed
