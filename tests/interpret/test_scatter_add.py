"""W = scale B A + S: the product and the entries of S, in one rounding."""

import pytest
import torch
from cases import scatter_add as cases
from cases.bounds import Near, assert_within
from cases.draw import Seeded

from lowrank_sys.kernels import traffic
from lowrank_sys.kernels.scatter_add import scatter_add_product

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# (m, n, r, k): one element, odd sizes, several tiles of every axis, a full S, none.
SHAPES = [(1, 1, 1, 1), (33, 50, 7, 5), (130, 272, 48, 20), (40, 129, 16, 129), (64, 64, 32, 0)]


def inputs(device, m, n, r, k, dtype=FP32):
    draw = Seeded(0)
    tensors = {"b": draw.values(m, r, dtype=dtype), "a": draw.values(r, n, dtype=dtype), "values": draw.values(m, k, dtype=dtype)}
    tensors["columns"] = cases.support(draw, m, n, k)
    return {name: tensor.to(device) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype, out", [(FP32, None), (BF16, None), (FP16, None), (FP32, BF16), (BF16, FP32)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(lane, shape, dtype, out):
    given = inputs(lane.device, *shape, dtype)
    got = scatter_add_product(**{name: lane.put(tensor) for name, tensor in given.items()}, scale=-0.25, dtype=out)
    assert got.dtype == (out or dtype)
    near = cases.near({name: tensor.cpu() for name, tensor in given.items()} | {"scale": -0.25})
    # Three tf32 products on a GPU have a few bits less than fp32.
    assert_within("W", got.cpu(), Near(near.value, 4 * near.error))
    lane.check_guards()


def test_every_entry_is_where_it_belongs(lane):
    """Whole numbers below 2²⁴ are exact: B A is 1 everywhere, and each entry is its own number."""
    m, n, k = 150, 300, 40
    given = inputs(lane.device, m, n, 1, k) | {"b": torch.ones(m, 1), "a": torch.ones(1, n)}
    given["values"] = torch.arange(m * k, dtype=FP32).reshape(m, k) + 1
    given = {name: tensor.to(lane.device) for name, tensor in given.items()}
    want = torch.ones(m, n, device=lane.device).scatter_add_(1, given["columns"].long(), given["values"])
    assert torch.equal(scatter_add_product(**given), want)


def test_a_value_that_is_not_finite_stays_in_its_place(lane):
    given = inputs(lane.device, 20, 140, 4, 6)
    given["values"][3, 2] = torch.nan
    w = scatter_add_product(**given)
    assert w.isnan().sum() == 1 and w[3, given["columns"][3, 2].item()].isnan()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("shape", [(33, 50, 7, 5), (130, 272, 48, 20), (64, 144, 128, 9)], ids=str)
def test_traffic(lane, meter, shape, dtype):
    m, n, r, k = shape
    given = inputs(lane.device, *shape, dtype)
    scatter_add_product(**given)
    (launch,) = meter.launches
    want = traffic.scatter_add_product(m, n, r, k, dtype=dtype)
    columns = want.pop("columns")
    assert {name: meter.bytes(launch, name) for name in want} == want
    # Halving ends early where a row's entries are all on one side.
    assert columns.loaded / 4 <= meter.bytes(launch, "columns")[0] <= columns.loaded


def test_realistic_bytes_by_formula():
    """A layer of llama-7b at 3%, rank 1024, on an H100: S costs less than a fifth of what W's factors and W itself move."""
    for dtype in (BF16, FP32):
        rows = traffic.scatter_add_product(4096, 4096, 1024, 123, dtype=dtype)
        sparse = rows["values"].loaded + rows["columns"].loaded
        assert sparse < 0.2 * sum(sum(moved) for name, moved in rows.items() if name not in ("values", "columns"))
