"""Random bits drawn in a kernel are the oracle's."""

import pytest
import torch
import triton
import triton.language as tl

from lowrank_sys.kernels.random import random16
from lowrank_sys.reference import philox


@triton.jit
def draw_kernel(out, seed, step, parameter, first, n, BLOCK: tl.constexpr):
    o_out = tl.arange(0, BLOCK)
    tl.store(out + o_out, random16(seed, step, parameter, first + o_out.to(tl.int64)).to(tl.int32), mask=o_out < n)


@pytest.mark.parametrize("seed", [0, 12345, 2**63 - 1, -1])
@pytest.mark.parametrize("first", [0, 3, 2**35 + 5])
def test_bits_are_the_oracles(lane, seed, first):
    out = torch.empty(200, dtype=torch.int32, device=lane.device)
    draw_kernel[1,](out=out, seed=seed, step=9, parameter=4, first=first, n=200, BLOCK=256)
    want = philox.random16(first, 200, seed=seed, step=9, parameter=4)
    assert torch.equal(out.cpu().long(), want)
