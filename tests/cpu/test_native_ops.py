"""Every C++ op on the CPU against the oracle in fp64."""

import pytest
import torch
from resident import measured, peak_of

import lowrank_sys  # noqa: F401  registers the ops
from lowrank_sys import backends

ops = torch.ops.lowrank
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ADAM = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
LOW_RANK = dict(**ADAM, scale=0.25)

pytestmark = pytest.mark.skipif(bool(backends.NATIVE_MISSING), reason=f"no native build: {backends.NATIVE_MISSING}")


def inputs(m, n, r, left, dtype=torch.float32, grad_dtype=None, basis_dtype=torch.float32, seed=0):
    """param, grad, basis, exp_avg, exp_avg_sq; second moments away from 0, where the oracle is well conditioned."""
    generator = torch.Generator().manual_seed(seed)
    d, shape = (m, (r, n)) if left else (n, (m, r))
    basis = torch.randn(d, r, generator=generator) / max(d, 1) ** 0.5
    return [
        torch.randn(m, n, generator=generator).to(dtype),
        torch.randn(m, n, generator=generator).to(grad_dtype or dtype),
        basis.to(basis_dtype),
        torch.randn(shape, generator=generator),
        torch.rand(shape, generator=generator) + 0.1,
    ]


def assert_near(got, want, tolerance):
    error = (got.double() - want.double()).abs()
    assert got.shape == want.shape and not (error > tolerance).any() and torch.equal(got.isnan(), want.isnan()), (
        f"off by {error.max()}, allowed {torch.as_tensor(tolerance).max()}"
    )


@pytest.mark.parametrize("left", [True, False])
def test_channel_norms_of_odd_values(left):
    grad = torch.zeros(40, 40)
    grad[3, 5], grad[7, 9], grad[11, 13] = torch.nan, -torch.inf, 1e-42
    norms = ops.channel_norms(grad, left=left)
    nan, inf = (5, 9) if left else (3, 7)
    assert norms[nan].isnan() and norms[inf] == torch.inf
    assert norms.nan_to_num(0, 0).sum() == 0


def test_adamw_step_is_torchs():
    w = torch.nn.Parameter(torch.randn(300, 20))
    ours, m, v, step = w.detach().clone(), torch.zeros(300, 20), torch.zeros(300, 20), torch.tensor(0.0)
    optimizer = torch.optim.AdamW([w], lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for _ in range(10):
        w.grad = torch.randn(300, 20)
        optimizer.step()
        ops.adamw_step([ours], [w.grad], [m], [v], [step], lr=torch.tensor(0.01), **ADAM)
    assert_near(ours, w.detach(), 1e-6)


# Less than a quarter of the weight in fp32; in INT8, than half of G's codes.
@measured
@pytest.mark.parametrize("more, most", [({}, 4096 * 4096), ({"int8_gemm": True}, 4096 * 4096 // 2)], ids=["float", "int8_gemm"])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float32 with a NaN"])
def test_no_memory_of_the_size_of_the_weight(kind, left, more, most):
    if more and backends.NATIVE_MISSING:
        pytest.skip(f"no native build: {backends.NATIVE_MISSING}")
    args = inputs(4096, 4096, 16, left, torch.bfloat16 if kind == "bfloat16" else torch.float32)
    if "NaN" in kind:
        args[1][5, 7] = torch.nan
    hyper = dict(step=1, lr=0.1, **LOW_RANK, left=left, **more)
    ops.galore_step(*inputs(512, 512, 16, left), **hyper)
    assert peak_of(lambda: ops.galore_step(*args, **hyper)) < most
