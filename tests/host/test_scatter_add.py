"""Rows of a low-rank plus sparse weight on 1, 32 and 256 real threads: the bits of the op."""

import pytest
import torch
from cases.draw import Seeded
from cases.scatter_add import support

_host = pytest.importorskip("lowrank_sys._host", reason="lowrank_sys._host is built by an editable install")

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def name(dtype):
    return str(dtype).removeprefix("torch.")


def array(tensor):
    """numpy view; bfloat16 and float16 as their bits."""
    return tensor.numpy() if tensor.dtype in (FP32, torch.int32) else tensor.view(torch.uint16).numpy()


@pytest.mark.parametrize("dtype, out", [(FP32, FP32), (BF16, FP16), (FP16, BF16), (FP32, BF16)], ids=str)
@pytest.mark.parametrize("n, k", [(1, 1), (45, 0), (300, 9), (70, 70)])
def test_rows_are_those_of_the_op(n, k, dtype, out):
    product, values = torch.randn(3, n), torch.randn(3, k).to(dtype)
    columns = support(Seeded(0), 3, n, k)
    want = torch.ops.lowrank.scatter_add_product(product, torch.eye(n), values, columns, scale=-0.3, dtype=out)
    for threads in (1, 32, 256):
        for wide in (n, 16):
            got = torch.empty(3, n, dtype=out)
            given = (array(product), -0.3, array(values), name(dtype), array(columns), array(got), name(out), wide)
            _host.merge_row(threads, *given)
            assert torch.equal(got, want), (threads, wide)


@pytest.mark.parametrize(
    "columns, wrong",
    [([], 0), ([0, 3, 9], 3), ([-1, 3], 0), ([2, 2, 3], 1), ([2, 1, 11], 1), ([0, 10], 1), ([0, -(2**31), 2**31 - 1], 1)],
)
def test_the_first_column_out_of_place(columns, wrong):
    assert _host.first_wrong_column(torch.tensor(columns, dtype=torch.int32).numpy(), 10) == wrong
