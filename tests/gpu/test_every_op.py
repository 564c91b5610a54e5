"""The one table of cases on the device: ops of bytes give what the CPU gives, within what the order of sums leaves."""

import pytest
import torch
from cases import CASES
from cases.case import check_call, overload, replace
from cases.draw import NAMED, Simplest, named

from lowrank_sys import backends

SERVED = {row.op: row.implementation for row in backends.table() if row.device == "cuda"}
# Products in Triton have bounds of their own (tf32x3, operands of 16 bits): the other files here.
BYTES = [op for op in CASES if SERVED.get(op.split()[0], "CUDA C++") == "CUDA C++"]


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("op", BYTES)
def test_named_sizes(op, name):
    for seed in range(4):
        check_call(op, CASES[op], named(op, name, seed), overload(op), "cuda")


@pytest.mark.parametrize("op", CASES)
def test_opcheck(op):
    arguments = {name: replace(value, torch.Tensor.cuda) for name, value in CASES[op].arguments(Simplest()).items()}
    torch.library.opcheck(overload(op), (), arguments)
