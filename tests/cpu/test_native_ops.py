"""Every C++ op on the CPU against the oracle in fp64."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from refusals import assert_refused, clone

import lowrank_sys  # noqa: F401  registers the ops
from lowrank_sys import backends, reference
from lowrank_sys._ops import numerics

ops = torch.ops.lowrank
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SHAPES = [(1, 200, 1), (200, 1, 1), (63, 100, 7), (129, 64, 64), (64, 129, 64), (1100, 1030, 5), (5, 3, 3)]
EMPTY = [(0, 20, 3), (20, 0, 3), (0, 0, 3)]
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


def product_error(a, b):
    """What a product of fp32 matrices may be off by: one rounding for each root of its depth."""
    bound = a.double().abs() @ b.double().abs()
    return 2.0**-23 * max(a.shape[1], 1) ** 0.5 * (bound.max() if bound.numel() else 0)


def assert_step(got, want, grad, left):
    """`got` [param, basis, exp_avg, exp_avg_sq] after a step of lr 0.1 against `want`, in fp64."""
    (param, basis, m, v), (param64, _, m64, v64) = got, want
    b = basis.double()
    r_error = product_error(b.T, grad) if left else product_error(grad, b)
    r_size = (b.T @ grad.double() if left else grad.double() @ b).abs().amax() if grad.numel() else torch.tensor(0.0)
    assert_near(m, m64, 2.0**-22 * (1 + m64.abs()) + r_error)
    assert_near(v, v64, 2.0**-22 * (1 + v64.abs()) + 2 * r_size * r_error)
    # An error of r enters x over sqrt(v) > 0.3; 0.025 = lr * scale.
    x_size = 40.0
    back_error = 0.025 * b.abs().sum(1).max() * (4 * r_error + 2.0**-22 * x_size) if b.numel() else 0
    assert_near(param, param64, ROUNDING[param.dtype] * (2 * param64.abs() + 2.0**-14) + back_error)


def untouched(x, keep, left):
    """The channels of `x` in `keep`."""
    return x[:, keep] if left else x[keep]


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES + EMPTY)
def test_galore_step_against_oracle(shape, dtype, left):
    m, n, r = shape
    args = inputs(m, n, min(r, m if left else n) or r, left, dtype)
    want = clone(args, torch.Tensor.double)
    hyper = dict(step=3, lr=0.1, **LOW_RANK, left=left)
    assert ops.galore_step(*args, **hyper) is None
    reference.named("galore_step")(*want, **hyper)
    assert_step(args[:1] + args[2:], want[:1] + want[2:], args[1], left)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("dtypes", [(1, 0, 2), (0, 2, 1), (2, 1, 0)])
def test_mixed_dtypes_against_oracle(dtypes, left):
    args = inputs(63, 100, 7, left, *(FLOATS[i] for i in dtypes))
    want = clone(args, torch.Tensor.double)
    hyper = dict(step=torch.tensor(1.0), lr=torch.tensor(0.1), **LOW_RANK, left=left)
    ops.galore_step(*args, **hyper)
    reference.named("galore_step")(*want, **hyper)
    assert_step(args[:1] + args[2:], want[:1] + want[2:], args[1], left)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_subspace_step_against_oracle(dtype, left):
    param, grad, basis, m, v = inputs(129, 64, 20, left, dtype)
    r = ops.project(grad, basis, left=left)
    got, want = [param, r, basis, m, v], clone([param, r, basis, m, v], torch.Tensor.double)
    before = r.clone()
    ops.subspace_step(*got, step=2, lr=0.1, **LOW_RANK, left=left)
    reference.named("subspace_step")(*want, step=2, lr=0.1, **LOW_RANK, left=left)
    assert torch.equal(r, before)
    assert_step(got[:1] + got[2:], want[:1] + want[2:], grad, left)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES + EMPTY)
def test_project_and_norms_against_oracle(shape, dtype, left):
    _, grad, basis, _, _ = inputs(*shape, left, dtype)
    b = basis.double()
    assert_near(
        ops.project(grad, basis, left=left),
        reference.project(grad.double(), b, left=left),
        product_error(b.T, grad) if left else product_error(grad, b),
    )
    want = reference.channel_norms(grad.double(), left=left)
    assert_near(ops.channel_norms(grad, left=left), want, 2.0**-20 * want)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES + EMPTY)
@pytest.mark.parametrize("alpha, beta", [(1.0, 1.0), (-0.5, 0.25), (2.0, 0.0)])
def test_back_project_against_oracle(shape, dtype, left, alpha, beta):
    param, _, basis, x, _ = inputs(*shape, left, dtype)
    want = param.double()
    assert ops.back_project_(param, x, basis, alpha=alpha, beta=beta, left=left) is None
    reference.back_project_(want, x.double(), basis.double(), alpha=alpha, beta=beta, left=left)
    error = abs(alpha) * (product_error(basis, x) if left else product_error(x, basis.T))
    assert_near(param, want, ROUNDING[dtype] * (2 * want.abs() + 2.0**-14) + 2 * error)


@pytest.mark.parametrize("left", [True, False])
def test_channel_norms_of_odd_values(left):
    grad = torch.zeros(40, 40)
    grad[3, 5], grad[7, 9], grad[11, 13] = torch.nan, -torch.inf, 1e-42
    norms = ops.channel_norms(grad, left=left)
    nan, inf = (5, 9) if left else (3, 7)
    assert norms[nan].isnan() and norms[inf] == torch.inf
    assert norms.nan_to_num(0, 0).sum() == 0


def skipping(left, dtype):
    """Arguments whose gradient has channels that must be left out, and those channels' flags."""
    args = inputs(130, 140, 6, left, dtype)
    grad = args[1] if left else args[1].T
    grad[5, 3], grad[0, 10], grad[129 if left else 0, 11] = torch.nan, torch.inf, -torch.inf
    bad = torch.zeros(140 if left else 130, dtype=torch.bool)
    bad[[3, 10, 11]] = True
    if dtype != torch.float16:
        grad[:, 20] = 1e30
        bad[20] = True
    return args, bad


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_bad_channels_keep_their_bits(dtype, left):
    args, bad = skipping(left, dtype)
    before, want = clone(args), clone(args, torch.Tensor.double)
    step, skipped = torch.tensor(4.0), torch.tensor(7)
    hyper = dict(lr=torch.tensor(0.1), **LOW_RANK, left=left)
    ops.galore_step(*[[x] for x in args], [step], **hyper, skipped=skipped)
    assert skipped == 7 + int(bad.sum()) * args[0].shape[0 if left else 1]
    for now, then in zip(args, before):
        if now is not args[1] and now is not args[2]:
            assert torch.equal(untouched(now, bad, left).view(torch.uint8), untouched(then, bad, left).view(torch.uint8))
    reference.named("galore_step")(*want, step=5, **hyper)
    good = [untouched(x, ~bad, left) for x in (args[0], args[3], args[4])]
    good64 = [untouched(x, ~bad, left) for x in (want[0], want[3], want[4])]
    grad = untouched(args[1], ~bad, left)
    assert_step([good[0], args[2], *good[1:]], [good64[0], want[2], *good64[1:]], grad, left)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("poisoned", ["grad", "basis"])
def test_nothing_finite_changes_nothing(poisoned, dtype, left):
    args = inputs(33, 40, 6, left, dtype)
    args[1 if poisoned == "grad" else 2].fill_(torch.nan)
    before = clone(args)
    ops.galore_step(*args, step=1, lr=0.1, **LOW_RANK, left=left)
    assert all(torch.equal(args[i], before[i]) for i in (0, 3, 4))


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("tiny", [0.0, 1e-42, 1e-30])
def test_tiny_gradients(tiny, left):
    args = inputs(20, 30, 4, left)
    args[1].fill_(tiny), args[3].zero_(), args[4].zero_()
    want = clone(args, torch.Tensor.double)
    hyper = dict(step=1, lr=0.1, **LOW_RANK, left=left)
    ops.galore_step(*args, **hyper)
    reference.named("galore_step")(*want, **hyper)
    # Both moments underflow beside eps.
    assert_near(args[0], want[0], 1e-6)


def as_lists(count, left, dtype=torch.float32):
    sets = [inputs(20 + i, 30, 4, left, dtype, seed=i) for i in range(count)]
    return [list(column) for column in zip(*sets)]


@pytest.mark.parametrize("left", [True, False])
def test_a_list_is_its_matrices_one_by_one(left):
    lists = as_lists(3, left)
    steps = [torch.tensor(float(i)) for i in range(3)]
    want = [[x.clone() for x in matrix] for matrix in zip(*lists)]
    hyper = dict(lr=torch.tensor(0.1), **LOW_RANK, left=left)
    ops.galore_step(*lists, steps, **hyper, grad_scale=torch.tensor([0.5]), found_inf=torch.tensor(0.0))
    assert [float(step) for step in steps] == [1, 2, 3]
    for i, args in enumerate(want):
        args[1] *= 0.5
        ops.galore_step(*args, step=torch.tensor(i + 1), **hyper)
        for column in (0, 3, 4):
            assert torch.equal(lists[column][i], args[column])


@pytest.mark.parametrize("op", ["galore_step", "subspace_step", "adamw_step"])
def test_found_inf_makes_the_step_a_no_op(op):
    lists, extra = as_lists(2, True), dict(**LOW_RANK, left=True)
    if op == "subspace_step":
        lists[1] = [torch.randn_like(m) for m in lists[3]]
    if op == "adamw_step":
        lists = [lists[0], lists[1], clone(lists[0]), clone(lists[0], torch.Tensor.abs)]
        extra = ADAM
    lists[1][0].fill_(torch.nan)
    steps, skipped = [torch.tensor(2.0), torch.tensor(3.0)], torch.tensor(5)
    before = clone(lists)
    getattr(ops, op)(*lists, steps, lr=torch.tensor(0.1), **extra, found_inf=torch.tensor(1.0), skipped=skipped)
    assert [float(step) for step in steps] == [2, 3] and skipped == 5
    for now, then in zip(lists, before):
        assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(now, then))


@pytest.mark.parametrize("op", ["galore_step", "adamw_step"])
def test_empty_lists(op):
    extra = ADAM if op == "adamw_step" else dict(**LOW_RANK, left=True)
    getattr(ops, op)(*[[]] * (5 if op == "adamw_step" else 6), lr=torch.tensor(0.1), **extra)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("grad_dtype", FLOATS)
@pytest.mark.parametrize("shape", [(70000,), (3, 5, 7), (0,), ()])
def test_adamw_step_against_oracle(shape, grad_dtype, dtype):
    w, g = torch.randn(shape).to(dtype), torch.randn(shape).to(grad_dtype)
    m, v = torch.randn(shape), torch.rand(shape) + 0.1
    if w.numel() > 9:
        g.view(-1)[[3, -1]] = torch.tensor([torch.nan, torch.inf], dtype=grad_dtype)
    got, step, skipped = [w.clone(), g, m.clone(), v.clone()], torch.tensor(2.0), torch.tensor(1)
    want = clone([w, g, m, v], torch.Tensor.double)
    ops.adamw_step(*[[x] for x in got], [step], lr=torch.tensor(0.1), **ADAM, grad_scale=torch.tensor(0.5), skipped=skipped)
    adamw_oracle(*want, step=3, lr=0.1, grad_scale=0.5)
    assert step == 3 and skipped == 1 + (2 if w.numel() > 9 else 0)
    assert_near(got[0], want[0], ROUNDING[dtype] * (2 * want[0].abs() + 2.0**-14) + 2.0**-22 * 5)
    assert_near(got[2], want[2], 2.0**-22 * (1 + want[2].abs()))
    assert_near(got[3], want[3], 2.0**-22 * (1 + want[3].abs()))
    if w.numel() > 9:
        for now, then in zip(got, (w, g, m, v)):
            assert torch.equal(now.view(-1)[[3, -1]].view(torch.uint8), then.view(-1)[[3, -1]].view(torch.uint8))


def adamw_oracle(w, g, m, v, *, step, lr, grad_scale):
    """The oracle's adamw_step in fp64, whose rules the op's own inputs would fail."""
    g = g * grad_scale
    ok = numerics.usable(g)
    update = reference.adam.adam_(g, m, v, ok, step=step, **{k: ADAM[k] for k in ("beta1", "beta2", "eps")})
    w.copy_(torch.where(ok, (1 - lr * ADAM["weight_decay"]) * w - lr * update, w))


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


def sample_calls():
    """One call of every op and overload."""
    tensors = dict(step=torch.tensor(2.0), lr=torch.tensor(0.1))
    for left in (True, False):
        one = inputs(8, 12, 3, left, torch.bfloat16)
        low = [one[0], torch.randn_like(one[3]), *one[2:]]
        lists = as_lists(2, left)
        steps = [torch.tensor(0.0), torch.tensor(1.0)]
        guards = dict(grad_scale=torch.tensor(0.5), found_inf=torch.tensor(0.0), skipped=torch.tensor(0))
        extra = dict(**LOW_RANK, left=left)
        for name, args in (("galore_step", one), ("subspace_step", low)):
            columns = lists if name == "galore_step" else [lists[0], clone(lists[3]), *lists[2:]]
            yield getattr(ops, name).default, args, dict(step=2, lr=0.1, **extra)
            yield getattr(ops, name).tensor, args, tensors | extra
            yield getattr(ops, name).list, [*columns, steps], dict(lr=tensors["lr"], **extra, **guards)
        moments = [[x * 0.1 for x in lists[0]], [x.abs() for x in lists[0]]]
        yield ops.adamw_step.default, [lists[0], lists[1], *moments, steps], dict(lr=tensors["lr"], **ADAM, **guards)
        yield ops.project.default, one[1:3], dict(left=left)
        yield ops.back_project_.default, [one[0], one[3], one[2]], dict(alpha=0.5, beta=0.9, left=left)
        yield ops.channel_norms.default, [one[1]], dict(left=left)


def test_opcheck():
    for op, args, hyper in sample_calls():
        torch.library.opcheck(op, tuple(args), hyper)


def test_every_op_is_served_natively():
    for op, *_ in sample_calls():
        name = str(op).removeprefix("lowrank.").removesuffix(".default")
        assert {row.implementation for row in backends.table() if (row.op, row.device) == (name, "cpu")} == {"C++"}


def memory(line):
    """A line of /proc/self/status, in bytes."""
    return int(re.search(line + r":\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no /proc/self/clear_refs")
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float32 with a NaN"])
def test_no_memory_of_the_size_of_the_weight(kind, left):
    args = inputs(4096, 4096, 16, left, torch.bfloat16 if kind == "bfloat16" else torch.float32)
    if "NaN" in kind:
        args[1][5, 7] = torch.nan
    hyper = dict(step=1, lr=0.1, **LOW_RANK, left=left)
    ops.galore_step(*inputs(512, 512, 16, left), **hyper)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    ops.galore_step(*args, **hyper)
    assert memory("VmHWM") - before < 4096 * 4096  # a quarter of the weight in fp32


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="MALLOC_PERTURB_ is glibc's")
def test_no_read_of_uninitialised_memory():
    """Allocations come filled with 3e38: the same tests must still pass."""
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", __file__, "-k", "against_oracle and not 1100"]
    done = subprocess.run(command, env=os.environ | {"MALLOC_PERTURB_": "128"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_step_on_several_threads(dtype, left):
    got, want = (inputs(1100, 1030, 5, left, dtype) for _ in range(2))
    got[1][3, 7] = want[1][3, 7] = float("nan")
    before = torch.get_num_threads()
    for values, threads in ((got, 3), (want, 1)):
        torch.set_num_threads(threads)
        ops.galore_step(*values, step=2, lr=0.1, left=left, **LOW_RANK)
    torch.set_num_threads(before)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=2 * ROUNDING[a.dtype], equal_nan=True)
