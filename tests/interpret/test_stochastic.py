"""Stochastic rounding at the store of a weight: to the bit where its inputs are, and in every step."""

import pytest
import torch

from lowrank_sys import reference
from lowrank_sys.kernels.apply import SCALED, Drawn, launch_apply
from lowrank_sys.kernels.back_project import _scalars
from lowrank_sys.kernels.common import GRAD_SCALE
from lowrank_sys.kernels.step import step

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
HYPER = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


def hostile(m, n):
    """Values of every size, subnormals of both types and what is beyond them."""
    draw = torch.Generator().manual_seed(3)
    values = torch.randn(m, n, generator=draw) * torch.tensor([1.0, 2.0**-15, 2.0**-23, 3e4, 1e-39]).repeat(n)[:n]
    edges = [65504.0, 65519.9, 65520.0, -7e4, 3.3895e38, 3.4e38, torch.inf, -torch.inf, torch.nan, 2.0**-24, 2.0**-25, 1e-45]
    values[1, : len(edges)] = torch.tensor(edges)
    return values


@HALVES
@pytest.mark.parametrize("n, offset", [(40, 0), (40, 2**35), (37, 0), (40, 3)])
def test_a_store_is_the_oracles_to_the_bit(lane, dtype, n, offset):
    values = hostile(19, n)
    weight = lane.put(torch.zeros(19, n, dtype=dtype, device=lane.device))
    scalars = _scalars(1.0, 0.0, lane.device)
    scalars[GRAD_SCALE.value] = 1.0
    drawn = Drawn(None, torch.tensor(9, device=lane.device), -3, 2**31 + 1, offset)
    launch_apply([weight], scalars, left=True, phi=SCALED, grad=values.to(lane.device), is_step=False, drawn=drawn)
    want = torch.empty(19, n, dtype=dtype)
    reference.round_stochastic_(want, values, seed=-3, step=torch.tensor(9), parameter=2**31 + 1, offset=offset)
    got = weight.cpu()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(0.0, 7.0, -7.0), want.nan_to_num(0.0, 7.0, -7.0))
    lane.check_guards()


@SIDES
@HALVES
@pytest.mark.parametrize("remainder", ["none", "scaled-gradient", "scaled-residual", "state-free", "int8 products"])
def test_a_step_draws_as_the_oracle(lane, remainder, dtype, left):
    int8_gemm = remainder == "int8 products"
    remainder = "none" if int8_gemm else remainder
    draw = torch.Generator().manual_seed(1)
    m, n, r = 40, 56, 6
    d, shape = (m, (r, n)) if left else (n, (m, r))
    randn = lambda *size: torch.randn(size, generator=draw)  # noqa: E731
    basis = torch.linalg.qr(randn(d, r)).Q.contiguous()
    lists = [[randn(m, n).to(dtype)] * 1, [], [randn(m, n)], [basis], [], [0.1 * randn(*shape), 0.1 + randn(*shape).abs()]]
    lists.append([torch.tensor(2.0)])
    options = dict(
        weight="float", basis="dense", moments="fp32", rule="ratio-adam" if remainder.startswith("scaled") else "adam",
        remainder=remainder, left=left, int8_gemm=int8_gemm, scale=0.25, lr=torch.tensor(0.01, dtype=torch.float64), **HYPER,
    )  # fmt: skip
    results = {}
    for stochastic in (True, False):
        got = [[lane.put(t.clone().to(lane.device)) for t in tensors] for tensors in lists]
        want = [[t.clone() for t in tensors] for tensors in lists]
        draws = dict(stochastic=stochastic, seed=2**40, parameters=[7], offsets=[8])
        step(*got, **options, **draws)
        reference.step(*want, **options, **draws)
        results[stochastic] = got[0][0].cpu()
        assert (results[stochastic] == want[0][0]).double().mean() >= 0.99
    assert (results[True] == results[False]).double().mean() < 0.9
    lane.check_guards()
