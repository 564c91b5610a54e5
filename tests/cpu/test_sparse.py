"""Structured sparse ops on the CPU: gather, scatter and the step against the oracle in fp64."""

import pytest
import torch
from refusals import assert_refused
from threads import threads
from torch._dynamo.testing import CompileCounterWithBackend

import lowrank_sys  # noqa: F401  registers the ops
from lowrank_sys import reference

ops = torch.ops.lowrank
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
METHODS = ("top", "sample", "sample_replace")
HYPER = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, scale=0.25)
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
TYPES = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def inputs(m, n, r, left, dtype=torch.float32, grad_dtype=None, scaled=True, seed=0):
    """param, grad, indices (not sorted), row_scale, exp_avg, exp_avg_sq."""
    g, d, shape = draw(seed), m if left else n, (r, n) if left else (m, r)
    return [
        torch.randn(m, n, generator=g).to(dtype),
        torch.randn(m, n, generator=g).to(grad_dtype or dtype),
        torch.randperm(d, generator=g)[:r].int(),
        torch.rand(r, generator=g) + 0.5 if scaled else None,
        torch.randn(shape, generator=g),
        torch.rand(shape, generator=g) + 0.1,
    ]


def assert_near(got, want, tolerance):
    error = (got.double() - want.double()).abs()
    assert got.shape == want.shape and not (error > tolerance).any() and torch.equal(got.isnan(), want.isnan()), error.max()


# --- gather, scatter, norms


@SIDES
def test_gather_repeats_a_row(left):
    grad = torch.randn(6, 6)
    got = ops.gather_rows(grad, torch.tensor([4, 4, 0], dtype=torch.int32), None, left=left)
    assert torch.equal(got, grad[[4, 4, 0]] if left else grad[:, [4, 4, 0]])


@SIDES
@TYPES
def test_row_norms_are_the_other_sides_channel_norms(dtype, left):
    grad = torch.randn(37, 53).to(dtype)
    norms = ops.row_norms(grad, left=left)
    assert torch.equal(norms, ops.channel_norms(grad, left=not left))
    want = torch.linalg.vector_norm(grad.double(), dim=1 if left else 0)
    assert norms.shape == (37 if left else 53,)
    assert_near(norms, want, 2.0**-20 * want)


# --- the step


@SIDES
@TYPES
def test_the_step_is_gather_adam_scatter(dtype, left):
    """The step of the other low-rank ops with the selection as a dense basis."""
    args = inputs(40, 60, 8, left, dtype, grad_dtype=torch.float32)
    basis = torch.zeros(40 if left else 60, 8)
    basis[args[2].long(), torch.arange(8)] = args[3]
    want = [args[0].clone(), args[1], basis, args[4].clone(), args[5].clone()]
    hyper = dict(step=2, lr=0.1, left=left, **HYPER)
    ops.galore_step(*want, **hyper)
    ops.grass_step(*args, **hyper)
    assert_near(args[0], want[0], 2 * ROUNDING[dtype] * args[0].abs() + 2.0**-18)
    assert_near(args[4], want[3], 2.0**-20)


@SIDES
@TYPES
def test_all_rows_are_adamw(dtype, left):
    param, grad, *_ = inputs(30, 50, 4, left, dtype)
    m, v = torch.zeros(30, 50), torch.zeros(30, 50)
    want = [[param.clone()], [grad], [m.clone()], [v.clone()]]
    indices = torch.arange(30 if left else 50, dtype=torch.int32)
    hyper = HYPER | dict(scale=1.0)
    for step in range(1, 4):
        ops.grass_step(param, grad, indices, None, m, v, step=step, lr=0.1, left=left, **hyper)
    del hyper["scale"]
    steps = [torch.tensor(0.0)]
    for _ in range(3):
        ops.adamw_step(*want, steps, lr=torch.tensor(0.1, dtype=torch.float64), **hyper)
    assert torch.equal(param, want[0][0]) and torch.equal(m, want[2][0]) and torch.equal(v, want[3][0])


@SIDES
@TYPES
def test_without_decay_other_rows_keep_their_bits(dtype, left):
    args = inputs(90, 80, 5, left, dtype)
    rest = torch.ones(90 if left else 80, dtype=torch.bool)
    rest[args[2].long()] = False
    keep = (lambda x: x[rest]) if left else (lambda x: x[:, rest])
    args[0].index_fill_(0 if left else 1, rest.nonzero()[0], torch.nan)
    before = args[0].clone()
    ops.grass_step(*args, step=1, lr=1.0, left=left, **HYPER | dict(weight_decay=0.0))
    assert torch.equal(keep(args[0]).view(torch.uint8), keep(before).view(torch.uint8))
    moved = (args[0] != before) & ~before.isnan()
    assert moved.sum() > 4 * (80 if left else 90)  # of 5 rows; bf16 rounds small updates away


def as_lists(count, left, scaled=True):
    sets = [inputs(20 + i, 30, 4, left, scaled=scaled, seed=i) for i in range(count)]
    lists = [list(column) for column in zip(*sets)]
    return lists if scaled else lists[:3] + [[]] + lists[4:]


@SIDES
@TYPES
def test_several_threads(dtype, left):
    got, want = (inputs(1100, 1030, 5, left, dtype) for _ in range(2))
    got[1][got[2][0] if left else 3, 7 if left else got[2][0]] = torch.nan
    want[1].copy_(got[1])
    for values, count in ((got, 3), (want, 1)):
        with threads(count):
            ops.grass_step(*values, step=2, lr=0.1, left=left, **HYPER)
    assert all(torch.equal(got[i], want[i]) for i in (0, 4, 5))


# --- arguments


INDEX = torch.tensor([1, 7, 3, 0], dtype=torch.int32)
BAD = {
    "indices int64": (lambda a: a.update(indices=INDEX.long()), "indices must be torch.int32, got torch.int64"),
    "indices 2-dim": (lambda a: a.update(indices=INDEX[None]), "indices must be a vector (r,), got shape (1, 4)"),
    "indices empty": (lambda a: a.update(indices=INDEX[:0]), "rank must be at least 1, got indices of shape (0,)"),
    "indices strided": (lambda a: a.update(indices=torch.zeros(8, dtype=torch.int32)[::2]), "indices must be contiguous"),
    "scale size": (lambda a: a.update(row_scale=torch.ones(3)), "scale must have shape (4,), got (3,)"),
    "scale bf16": (lambda a: a.update(row_scale=torch.ones(4).bfloat16()), "scale must be torch.float32, got torch.bfloat16"),
    "param fp64": (lambda a: a.update(param=a["param"].double(), grad=a["grad"].double()), "must be float32, bfloat16 or fl"),
    "param strided": (lambda a: a.update(param=torch.zeros(30, 20).T, grad=torch.zeros(30, 20).T), "must be contiguous"),
    "exp_avg shape": (lambda a: a.update(exp_avg=torch.zeros(4, 29)), "must have shape (4, 30), got (4, 29)"),
    "exp_avg bf16": (lambda a: a.update(exp_avg=a["exp_avg"].bfloat16()), "must be torch.float32, got torch.bfloat16"),
    "exp_avg_sq shape": (lambda a: a.update(exp_avg_sq=torch.zeros(4)), "exp_avg_sq must have shape (4, 30), got (4,)"),
    "grad shape": (lambda a: a.update(grad=torch.zeros(20, 31)), "grad must have shape (20, 30), got (20, 31)"),
    "index high": (lambda a: a.update(indices=INDEX * 3), "indices[1] must be in [0, 20), got 21"),
    "index low": (lambda a: a.update(indices=INDEX - 1), "indices[3] must be in [0, 20), got -1"),
    "index twice": (lambda a: a.update(indices=INDEX.clamp(max=3)), "indices[2] = 3 repeats indices[1]"),
    "step": (lambda a: a.update(step=0), "grass_step: step counts from 1, got 0"),
    "step bool": (lambda a: a.update(step=torch.tensor(True), lr=torch.tensor(0.1)), "step must be float32, float64, int32 or"),
    "step 1-dim": (lambda a: a.update(step=torch.ones(1), lr=torch.tensor(0.1)), "step must be a 0-dim tensor, got shape (1,)"),
}
CALLS = {
    "grass_step": (("param", "grad", "indices", "row_scale", "exp_avg", "exp_avg_sq"), ("step", "lr", "left", *HYPER)),
    "scatter_add_rows_": (("param", "exp_avg", "indices", "row_scale"), ("left",)),
    "gather_rows": (("grad", "indices", "row_scale"), ("left",)),
}


# Rules that only the step has.
STEP_ONLY = ("grad shape", "exp_avg_sq shape", "step", "step bool", "step 1-dim")
BAD_CALLS = [
    (name, op)
    for name in BAD
    for op in CALLS
    if op == "grass_step"
    or name not in STEP_ONLY
    and not (op == "gather_rows" and (name == "index twice" or name.startswith("exp_avg")))
]


@pytest.mark.parametrize("name, op", BAD_CALLS)
def test_bad_arguments(name, op):
    change, expected = BAD[name]
    names, keys = CALLS[op]
    a = dict(zip(CALLS["grass_step"][0], inputs(20, 30, 4, True))) | dict(indices=INDEX, step=1, lr=0.1, left=True, **HYPER)
    change(a)
    args, hyper = [a[key] for key in names], {key: a[key] for key in keys}
    assert_refused(getattr(ops, op), args, hyper, expected, reference.ORACLES[op], fakes=not name.startswith("index "))


BAD_LISTS = {
    "grads short": (lambda a, h: a[1].pop(), "grads must have 2 tensors like params, got 1"),
    "indices short": (lambda a, h: a[2].pop(), "indices must have 2 tensors like params, got 1"),
    "row_scales short": (lambda a, h: a[3].pop(), "row_scales must have 2 tensors like params, got 1"),
    "steps int": (lambda a, h: a[6].__setitem__(1, torch.tensor(1)), "steps[1] must be torch.float32, got torch.int64"),
    "lr bool": (lambda a, h: h.update(lr=torch.tensor(True)), "lr must be float32, float64, int32 or int64, got torch.bool"),
    "grad_scale": (lambda a, h: h.update(grad_scale=torch.ones(2)), "grad_scale must have one element, got shape (2,)"),
    "skipped": (lambda a, h: h.update(skipped=torch.tensor(1.0)), "skipped must be torch.int64, got torch.float32"),
    "index of the second": (lambda a, h: a[2].__setitem__(1, INDEX + 20), "matrix 1: indices[0] must be in [0, 21), got 21"),
}


@pytest.mark.parametrize("name", BAD_LISTS)
def test_bad_lists(name):
    change, expected = BAD_LISTS[name]
    lists, hyper = [*as_lists(2, True), [torch.tensor(0.0), torch.tensor(1.0)]], dict(lr=torch.tensor(0.1), left=True, **HYPER)
    change(lists, hyper)
    assert_refused(ops.grass_step, lists, hyper, expected, reference.named("grass_step.list"), fakes="index" not in name)


# --- torch's contracts


def test_compiles_into_one_graph():
    def run(param, grad, m, v, step, lr):
        norms = ops.row_norms(grad, left=True)
        indices, scale = ops.select_rows(norms, r=4, method="sample", seed=1)
        ops.grass_step(param, grad, indices, scale, m, v, step=step, lr=lr, left=True, **HYPER)

    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled, states = torch.compile(run, fullgraph=True, backend=counter), []
    for function in (compiled, run):
        param, grad, _, _, m, v = inputs(16, 24, 4, True)
        for i in range(5):
            function(param, grad, m, v, torch.tensor(i + 1.0), torch.tensor(1e-2 / (i + 1)))
        states.append(param)
    assert counter.frame_count == 1
    assert torch.equal(*states)
