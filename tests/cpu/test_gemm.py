"""Thin fp32 products of large matrices: the project's own kernels, where the processor has AVX-512."""

import pytest
import torch
from lanes import usual
from test_native_ops import FLOATS, LOW_RANK, inputs
from threads import threads

from lowrank_sys import backends

ops = torch.ops.lowrank
# No side is a multiple of a tile; ranks of a part of a panel and of several.
SHAPES = [(1030, 1021, 3), (2053, 2100, 37), (530, 16003, 130), (16003, 530, 130)]

pytestmark = pytest.mark.skipif(bool(backends.NATIVE_MISSING), reason=f"no native build: {backends.NATIVE_MISSING}")


def operands(m, n, r, left, dtype, seed=0):
    """A matrix, a basis with columns of length about 1, and a low-rank matrix."""
    matrix, _, basis, low_rank, _ = inputs(m, n, r, left, dtype, seed=seed)
    return matrix, basis, low_rank


def bound(a, b):
    """What fp32 sums of products may be off by: a random walk of roundings, eight times over."""
    return 8 * 2**-24 * a.shape[1] ** 0.5 * (a.double().norm(dim=1)[:, None] * b.double().norm(dim=0)[None]).clamp_min(1e-30)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_project(shape, dtype, left):
    grad, basis, _ = operands(*shape, left, dtype)
    a, b = (basis.T, grad.float()) if left else (grad.float(), basis)
    got = ops.project(grad, basis, left=left)
    assert ((got.double() - a.double() @ b.double()).abs() <= bound(a, b)).all()


@pytest.mark.parametrize("beta", usual([0.9], 0.0, 1.0))
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_back_project(shape, dtype, left, beta):
    param, basis, x = operands(*shape, left, dtype)
    a, b = (basis, x) if left else (x, basis.T)
    kept = beta * param.double()
    want = kept - 0.5 * (a.double() @ b.double())
    if beta == 0.0:
        param[3, 5] = torch.nan  # is not read
    ops.back_project_(param, x, basis, alpha=-0.5, beta=beta, left=left)
    # Of beta, of its product, and of the result.
    rounding = 2**-23 * kept.abs() + torch.finfo(dtype).eps * want.abs() + torch.finfo(dtype).smallest_normal
    assert ((param.double() - want).abs() <= bound(a, b) + rounding).all()


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_channel(value, left):
    grad, basis, _ = operands(2053, 2100, 37, left, torch.float32)
    want = ops.project(grad, basis, left=left)
    channels = (0, 17, 2052)
    for c in channels:
        grad[(9, c) if left else (c, 9)] = value
    got = ops.project(grad, basis, left=left)
    bad = torch.zeros(2100 if left else 2053, dtype=torch.bool)
    bad[list(channels)] = True
    got, want = (got.T, want.T) if left else (got, want)
    assert not got[bad].isfinite().any() and torch.equal(got[~bad], want[~bad])


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_step_leaves_channels_out(dtype, left):
    param, grad, basis, m, v = inputs(2053, 2100, 37, left, dtype)
    bad = torch.tensor([0, 17, 50, 2052])
    for c in bad.tolist():
        grad[(9, c) if left else (c, 9)] = torch.nan
    before = param.clone()
    ops.galore_step(param, grad, basis, m, v, step=3, lr=0.1, **LOW_RANK, left=left)
    channels = (param.T, before.T) if left else (param, before)
    same = (channels[0] == channels[1]).all(1)
    assert same.nonzero().flatten().tolist() == bad.tolist() and param.isfinite().all()


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="torch's GEMM serves without AVX-512")
@pytest.mark.parametrize("left", [True, False])
def test_results_do_not_depend_on_threads(left):
    results = []
    grad, basis, _ = operands(2900, 2901, 100, left, torch.float32)
    for count in (1, 2, 5):
        with threads(count):
            results.append(ops.project(grad, basis, left=left))
    assert all(torch.equal(other, results[0]) for other in results[1:])
