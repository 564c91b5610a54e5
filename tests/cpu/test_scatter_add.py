"""A low-rank plus sparse weight on the CPU: memory, refusals, and products that BLAS would not make."""

import pytest
import torch
from cases.draw import Seeded
from cases.scatter_add import support
from resident import allocated

from lowrank_sys import backends, reference
from lowrank_sys.memory.workspace import scratch_bytes

op = torch.ops.lowrank.scatter_add_product.default
FP32, BF16 = torch.float32, torch.bfloat16


def inputs(m, n, r, k, dtype=FP32):
    torch.manual_seed(0)
    tensors = (torch.randn(m, r), torch.randn(r, n), torch.randn(m, k))
    return [*(tensor.to(dtype) for tensor in tensors), support(Seeded(0), m, n, k)]


@pytest.mark.skipif(bool(backends.NATIVE_MISSING), reason=f"no native build: {backends.NATIVE_MISSING}")
@pytest.mark.parametrize("dtype, out, tiled", [(FP32, FP32, False), (BF16, FP32, False), (FP32, BF16, True), (BF16, BF16, True)])
def test_scratch(dtype, out, tiled):
    """Copies of 16-bit factors; a tile of the product, where it is not fp32."""
    m, n, r = 1500, 1100, 24  # above one tile
    given = inputs(m, n, r, 30, dtype)
    want = (4 * r * (m + n) if dtype == BF16 else 0) + (4 << 20 if tiled else 0)
    assert allocated(op, *given, dtype=out) == scratch_bytes(op, given, {"dtype": out}) == want


@pytest.mark.parametrize("serve", [op, reference.ORACLES["scatter_add_product"]], ids=["op", "oracle"])
@pytest.mark.parametrize("at, column", [((3, 1), 5), ((0, 0), -1), ((499, 99), 3000), ((2, 4), 2**31 - 1)])
def test_the_first_column_out_of_place_is_named(serve, at, column):
    b, a, values, columns = inputs(500, 3000, 3, 100)
    columns[3] = torch.arange(100) + 5
    columns[at] = column
    least = int(columns[at[0], at[1] - 1]) + 1 if at[1] else 0
    with pytest.raises(RuntimeError) as error:
        serve(b, a, values, columns)
    said = f"scatter_add_product: columns[{at[0]}, {at[1]}] must be in [{least}, 3000), got {column}"
    assert str(error.value).splitlines()[0] == said


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_scale_of_zero_keeps_a_nan(dtype):
    b, a, values, columns = inputs(4, 40, 3, 5, dtype)
    b[1, 2] = torch.nan
    w = op(b, a, values, columns, scale=0.0)
    assert w[1].isnan().all() and not w[[0, 2, 3]].isnan().any()
    assert torch.equal(w[0], torch.zeros(40, dtype=dtype).scatter(0, columns[0].long(), values[0]))
