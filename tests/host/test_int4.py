"""INT4 codes on real threads: those of the op, to the bit, for every number of threads."""

import pytest
import torch
from test_host import FLOATS, THREADS, array, name, poisoned

_host = pytest.importorskip("lowrank_sys._host", reason="lowrank_sys._host is built by an editable install")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("d, r, group_size", [(515, 35, 256), (64, 64, 32), (33, 3, 1024), (1, 1, 64), (1056, 33, 512)])
def test_codes_are_those_of_the_op(d, r, group_size, dtype):
    basis = poisoned((d, r), dtype, 1) if d > 1 else torch.ones(1, 1).to(dtype)
    want = torch.ops.lowrank.quantize_int4(basis, group_size=group_size)
    values = torch.ops.lowrank.dequantize_int4(*want, d=d, group_size=group_size)
    for threads in THREADS:
        got = [torch.empty_like(x) for x in want]
        _host.quantize_int4(threads, array(basis), name(dtype), *(x.numpy() for x in got), group_size)
        assert torch.equal(got[0], want[0]), threads
        assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(got[1:], want[1:])), threads
        back = torch.empty(d, r)
        _host.dequantize_int4(threads, *(x.numpy() for x in got), group_size, back.numpy())
        assert torch.equal(back.view(torch.int32), values.view(torch.int32)), threads
