"""Every C++ op on the CPU against the oracle in fp64."""

import pytest
import torch
from refusals import assert_refused, clone
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


def as_lists(count, left, dtype=torch.float32):
    sets = [inputs(20 + i, 30, 4, left, dtype, seed=i) for i in range(count)]
    return [list(column) for column in zip(*sets)]


def test_adamw_step_is_torchs():
    w = torch.nn.Parameter(torch.randn(300, 20))
    ours, m, v, step = w.detach().clone(), torch.zeros(300, 20), torch.zeros(300, 20), torch.tensor(0.0)
    optimizer = torch.optim.AdamW([w], lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for _ in range(10):
        w.grad = torch.randn(300, 20)
        optimizer.step()
        ops.adamw_step([ours], [w.grad], [m], [v], [step], lr=torch.tensor(0.01), **ADAM)
    assert_near(ours, w.detach(), 1e-6)


STEP = dict(step=1, lr=0.1, **LOW_RANK, left=True)
BAD = {
    "param 3-dim": ("galore_step", lambda a: a.update(param=torch.zeros(2, 3, 4)), "param must be a matrix"),
    "param fp64": ("galore_step", lambda a: a.update(param=a["param"].double()), "param must be float32"),
    "param strided": ("galore_step", lambda a: a.update(param=torch.zeros(30, 20).T), "param must be contiguous"),
    "grad shape": ("galore_step", lambda a: a.update(grad=torch.zeros(20, 31)), "grad must have shape (20, 30)"),
    "grad 1-dim": ("galore_step", lambda a: a.update(grad=torch.zeros(20)), "got (20,)"),
    "grad int": ("galore_step", lambda a: a.update(grad=a["grad"].int()), "grad must be float32"),
    "grad strided": ("galore_step", lambda a: a.update(grad=torch.zeros(30, 20).T), "grad must be contiguous"),
    "basis shape": ("galore_step", lambda a: a.update(basis=torch.zeros(30, 4)), "basis must have shape (m = 20, r)"),
    "basis rank 0": ("galore_step", lambda a: a.update(basis=torch.zeros(20, 0)), "rank must be at least 1"),
    "basis fp64": ("galore_step", lambda a: a.update(basis=a["basis"].double()), "basis must be float32"),
    "basis strided": ("galore_step", lambda a: a.update(basis=torch.zeros(4, 20).T), "basis must be contiguous"),
    "exp_avg shape": ("galore_step", lambda a: a.update(exp_avg=torch.zeros(4, 29)), "exp_avg must have shape (4, 30)"),
    "exp_avg bf16": ("galore_step", lambda a: a.update(exp_avg=a["exp_avg"].bfloat16()), "exp_avg must be torch.float32"),
    "exp_avg_sq shape": ("galore_step", lambda a: a.update(exp_avg_sq=torch.zeros(4, 29)), "exp_avg_sq must have shape"),
    "exp_avg_sq strided": ("galore_step", lambda a: a.update(exp_avg_sq=torch.zeros(30, 4).T), "exp_avg_sq must be contig"),
    "left": ("galore_step", lambda a: a.update(left=False), "basis must have shape (n = 30, r) for left=False"),
    "step 1-dim": ("galore_step", lambda a: a.update(step=torch.ones(1), lr=torch.tensor(0.1)), "step must be a 0-dim"),
    "lr 1-dim": ("galore_step", lambda a: a.update(step=torch.tensor(1.0), lr=torch.ones(2)), "lr must be a 0-dim"),
    "step bool": ("galore_step", lambda a: a.update(step=torch.tensor(True), lr=torch.tensor(0.1)), "step must be float32, fl"),
    "lr bf16": ("galore_step", lambda a: a.update(step=torch.tensor(1), lr=torch.tensor(0.1).bfloat16()), "lr must be float32"),
    "low_rank_grad shape": ("subspace_step", lambda a: a.update(grad=torch.zeros(20, 30)), "low_rank_grad must have shape"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_matrices(name):
    op, change, expected = BAD[name]
    a = dict(zip(("param", "grad", "basis", "exp_avg", "exp_avg_sq"), inputs(20, 30, 4, True))) | STEP
    change(a)
    args, hyper = list(a.values())[:5], {k: a[k] for k in STEP}
    assert_refused(getattr(ops, op), args, hyper, expected)


def test_step_counts_from_one():
    assert_refused(ops.galore_step, inputs(20, 30, 4, True), STEP | dict(step=0), "galore_step: step counts from 1, got 0")


BAD_LISTS = {
    "grads short": (lambda a, h: a[1].pop(), "grads must have 2 tensors like params, got 1"),
    "steps short": (lambda a, h: a[-1].pop(), "steps must have 2 tensors like params, got 1"),
    "steps int": (lambda a, h: a[-1].__setitem__(1, torch.tensor(1)), "steps[1] must be torch.float32, got torch.int64"),
    "steps 1-dim": (lambda a, h: a[-1].__setitem__(1, torch.ones(3)), "steps[1] must be a 0-dim tensor, got shape (3,)"),
    "lr 1-dim": (lambda a, h: h.update(lr=torch.ones(1)), "lr must be a 0-dim tensor"),
    "lr bool": (lambda a, h: h.update(lr=torch.tensor(True)), "lr must be float32, float64, int32 or int64, got torch.bool"),
    "grad_scale size": (lambda a, h: h.update(grad_scale=torch.ones(2)), "grad_scale must have one element, got shape (2,)"),
    "found_inf dtype": (lambda a, h: h.update(found_inf=torch.tensor(True)), "found_inf must be torch.float32, got torch.bool"),
    "skipped dtype": (lambda a, h: h.update(skipped=torch.tensor(1.0)), "skipped must be torch.int64, got torch.float32"),
    "second grad": (lambda a, h: a[1].__setitem__(1, torch.zeros(3, 3)), "must have shape (21, 30), got (3, 3)"),
}


@pytest.mark.parametrize("op", ["galore_step", "adamw_step"])
@pytest.mark.parametrize("name", BAD_LISTS)
def test_bad_lists(name, op):
    change, expected = BAD_LISTS[name]
    lists, hyper = as_lists(2, True), dict(lr=torch.tensor(0.1), **LOW_RANK, left=True)
    if op == "adamw_step":
        lists, hyper = [lists[0], lists[1], clone(lists[0]), clone(lists[0])], dict(lr=torch.tensor(0.1), **ADAM)
    lists.append([torch.tensor(0.0), torch.tensor(1.0)])
    change(lists, hyper)
    assert_refused(getattr(ops, op), lists, hyper, expected)


@pytest.mark.parametrize(
    "name, args, hyper, expected",
    [
        ("project", (torch.zeros(3), torch.zeros(3, 2)), dict(left=True), "project: grad must be a matrix (m, n), got shape (3,)"),
        ("project", (torch.zeros(3, 4), torch.zeros(4, 2)), dict(left=True), "basis must have shape (m = 3, r) for left=True"),
        ("back_project_", (torch.zeros(3, 4), torch.zeros(2, 3), torch.zeros(3, 2)), dict(left=True), "low_rank must have shape"),
        ("back_project_", (torch.zeros(3, 4), torch.zeros(2, 4).half(), torch.zeros(3, 2)), dict(left=True), "got torch.float16"),
        ("channel_norms", (torch.zeros(3, 4).double(),), dict(left=True), "grad must be float32, bfloat16 or float16"),
    ],
)
def test_bad_products(name, args, hyper, expected):
    assert_refused(getattr(ops, name), list(args), hyper, expected)


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
