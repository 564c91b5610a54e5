"""Structured sparse ops on the CPU: gather, scatter and the step against the oracle in fp64."""

import pytest
import torch
from threads import threads
from torch._dynamo.testing import CompileCounterWithBackend

import lowrank_sys  # noqa: F401  registers the ops

ops = torch.ops.lowrank
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
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
