"""Structured sparse ops on the CPU: gather, scatter and the step against the oracle in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import assert_refused, clone
from torch._dynamo.testing import CompileCounterWithBackend

import lowrank_sys  # noqa: F401  registers the ops
from lowrank_sys import backends, reference

ops = torch.ops.lowrank
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
METHODS = ("top", "sample", "sample_replace")
HYPER = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, scale=0.25)
# m, n, r
SHAPES = [(1, 200, 1), (200, 1, 1), (63, 100, 7), (129, 300, 64), (5, 3, 3), (40, 700, 40)]
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


def assert_stepped(got, want, lr=0.1):
    """[param, exp_avg, exp_avg_sq] after a step against fp64."""
    (param, m, v), (param64, m64, v64) = got, want
    assert_near(m, m64, 2.0**-22 * (1 + m64.abs()))
    assert_near(v, v64, 2.0**-22 * (1 + v64.abs()))
    # The update m̂ / sqrt(v̂) is below 40 here and has a few roundings.
    assert_near(param, param64, ROUNDING[param.dtype] * (2 * param64.abs() + 2.0**-14) + lr * HYPER["scale"] * 1.5 * 40 * 2.0**-21)


# --- gather, scatter, norms


@SIDES
@TYPES
@pytest.mark.parametrize("shape", SHAPES + [(0, 20, 3), (20, 0, 3)])
@pytest.mark.parametrize("scaled", [True, False])
def test_gather_and_scatter_against_oracle(shape, dtype, left, scaled):
    m, n, r = shape
    if not (m if left else n):
        m, n = n, m
    r = min(r, m if left else n)
    param, grad, indices, scale, low_rank, _ = inputs(m, n, r, left, dtype, scaled=scaled)
    got = ops.gather_rows(grad, indices, scale, left=left)
    assert got.dtype == torch.float32
    assert torch.equal(got, reference.gather_rows(grad, indices, scale, left=left))  # one product an element
    p = torch.zeros(m if left else n, r, dtype=torch.float64)
    p[indices.long(), torch.arange(r)] = 1.0 if scale is None else scale.double()
    assert_near(got, p.T @ grad.double() if left else grad.double() @ p, 2.0**-23 * 8)
    before = param.clone()
    assert ops.scatter_add_rows_(param, low_rank, indices, scale, alpha=-0.5, left=left) is None
    want = before.double() - 0.5 * (p @ low_rank.double() if left else low_rank.double() @ p.T)
    assert_near(param, want, ROUNDING[dtype] * (2 * want.abs() + 2.0**-14) + 2.0**-20)
    rest = torch.ones(m if left else n, dtype=torch.bool)
    rest[indices.long()] = False
    keep = (lambda x: x[rest]) if left else (lambda x: x[:, rest])
    assert torch.equal(keep(param), keep(before))


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
@pytest.mark.parametrize("shape", SHAPES + [(0, 20, 3), (20, 0, 3)])
@pytest.mark.parametrize("decay", [0.1, 0.0])
def test_step_against_oracle(shape, dtype, left, decay):
    m, n, r = shape
    if not (m if left else n):
        m, n = n, m
    args = inputs(m, n, min(r, m if left else n), left, dtype)
    want = clone(args, torch.Tensor.double)
    hyper = dict(step=3, lr=0.1, left=left, **HYPER | dict(weight_decay=decay))
    assert ops.grass_step(*args, **hyper) is None
    reference.named("grass_step")(*want, **hyper)
    assert_stepped([args[i] for i in (0, 4, 5)], [want[i] for i in (0, 4, 5)])


@SIDES
@pytest.mark.parametrize("dtypes", [(1, 0), (0, 2), (2, 1)])
def test_mixed_dtypes(dtypes, left):
    args = inputs(63, 100, 7, left, *(FLOATS[i] for i in dtypes), scaled=False)
    want = clone(args, torch.Tensor.double)
    hyper = dict(step=torch.tensor(1.0), lr=torch.tensor(0.1), left=left, **HYPER)
    ops.grass_step(*args, **hyper)
    reference.named("grass_step")(*want, **hyper)
    assert_stepped([args[i] for i in (0, 4, 5)], [want[i] for i in (0, 4, 5)])


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


def poisoned(left, dtype):
    """Arguments with values that are not finite in selected rows, the flags of their channels, and one elsewhere."""
    args = inputs(130, 300, 6, left, dtype, scaled=False)
    grad, chosen = args[1] if left else args[1].T, args[2].long()
    grad[chosen[0], 3], grad[chosen[5], 10], grad[chosen[2], 257 if left else 127] = torch.nan, torch.inf, -torch.inf
    bad = torch.zeros(300 if left else 130, dtype=torch.bool)
    bad[[3, 10, 257 if left else 127]] = True
    if dtype != torch.float16:
        grad[chosen[1], 20] = 1e30
        bad[20] = True
    other = next(i for i in range(130) if i not in chosen)
    grad[other, 50] = torch.nan  # selected by nobody
    return args, bad


@SIDES
@TYPES
@pytest.mark.parametrize("decay", [0.1, 0.0])
def test_bad_channels_keep_their_bits(dtype, left, decay):
    args, bad = poisoned(left, dtype)
    want, before = clone(args, torch.Tensor.double), clone(args)
    skipped, hyper = torch.tensor(7), dict(left=left, **HYPER | dict(weight_decay=decay))
    lists = [[args[0]], [args[1]], [args[2]], [], [args[4]], [args[5]], [torch.tensor(4.0)]]
    ops.grass_step(*lists, lr=torch.tensor(0.1), **hyper, skipped=skipped)
    assert skipped == 7 + int(bad.sum()) * args[0].shape[0 if left else 1]

    def channels(x):
        return x[:, bad] if left else x[bad]

    for i in (0, 4, 5):
        assert torch.equal(channels(args[i]).view(torch.uint8), channels(before[i]).view(torch.uint8))
        assert args[i].isfinite().all()
    reference.named("grass_step")(*want, step=5, lr=0.1, **hyper)
    assert_stepped([args[i] for i in (0, 4, 5)], [want[i] for i in (0, 4, 5)])


def as_lists(count, left, scaled=True):
    sets = [inputs(20 + i, 30, 4, left, scaled=scaled, seed=i) for i in range(count)]
    lists = [list(column) for column in zip(*sets)]
    return lists if scaled else lists[:3] + [[]] + lists[4:]


@SIDES
@pytest.mark.parametrize("scaled", [True, False])
def test_a_list_is_its_matrices_one_by_one(left, scaled):
    lists = as_lists(3, left, scaled)
    want, steps = clone(lists), [torch.tensor(float(i)) for i in range(3)]
    hyper = dict(lr=torch.tensor(0.1), left=left, **HYPER)
    ops.grass_step(*lists, steps, **hyper, grad_scale=torch.tensor([0.5]), found_inf=torch.tensor(0.0))
    assert [float(step) for step in steps] == [1, 2, 3]
    for i in range(3):
        w, g, index, m, v = (want[k][i] for k in (0, 1, 2, 4, 5))
        ops.grass_step(w, g * 0.5, index, want[3][i] if scaled else None, m, v, step=torch.tensor(i + 1), **hyper)
        assert all(torch.equal(lists[k][i], want[k][i]) for k in (0, 4, 5))


def test_found_inf_makes_the_step_a_no_op():
    lists, steps, skipped = as_lists(2, True), [torch.tensor(2.0), torch.tensor(3.0)], torch.tensor(5)
    lists[1][0].fill_(torch.nan)
    before = clone(lists)
    ops.grass_step(*lists, steps, lr=torch.tensor(0.1), left=True, **HYPER, found_inf=torch.tensor(1.0), skipped=skipped)
    assert [float(step) for step in steps] == [2, 3] and skipped == 5
    assert all(torch.equal(a, b) for k in (0, 4, 5) for a, b in zip(lists[k], before[k]))
    ops.grass_step(*[[]] * 7, lr=torch.tensor(0.1), left=True, **HYPER)


@SIDES
@TYPES
def test_several_threads(dtype, left):
    got, want = (inputs(1100, 1030, 5, left, dtype) for _ in range(2))
    got[1][got[2][0] if left else 3, 7 if left else got[2][0]] = torch.nan
    want[1].copy_(got[1])
    before = torch.get_num_threads()
    for values, threads in ((got, 3), (want, 1)):
        torch.set_num_threads(threads)
        ops.grass_step(*values, step=2, lr=0.1, left=left, **HYPER)
    torch.set_num_threads(before)
    assert all(torch.equal(got[i], want[i]) for i in (0, 4, 5))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 300), st.data(), st.booleans(), st.sampled_from(FLOATS), st.booleans(), st.booleans())
def test_any_shape(m, n, data, left, dtype, scaled, decays):
    r = data.draw(st.integers(1, m if left else n))
    args = inputs(m, n, r, left, dtype, scaled=scaled, seed=m * n)
    if data.draw(st.booleans()):
        args[1].view(-1)[data.draw(st.integers(0, m * n - 1))] = data.draw(st.sampled_from([torch.nan, torch.inf, 0.0]))
    want = clone(args, torch.Tensor.double)
    hyper = dict(step=2, lr=0.1, left=left, **HYPER | dict(weight_decay=0.1 * decays))
    ops.grass_step(*args, **hyper)
    reference.named("grass_step")(*want, **hyper)
    assert_stepped([args[i] for i in (0, 4, 5)], [want[i] for i in (0, 4, 5)])


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


def sample_calls():
    """One call of every op and overload."""
    for left in (True, False):
        one, lists = inputs(8, 12, 3, left, torch.bfloat16), as_lists(2, left)
        steps, guards = [torch.tensor(0.0), torch.tensor(1.0)], dict(grad_scale=torch.tensor(0.5), skipped=torch.tensor(0))
        tensors = dict(step=torch.tensor(2.0), lr=torch.tensor(0.1))
        yield ops.row_norms.default, [one[1]], dict(left=left)
        yield ops.gather_rows.default, one[1:4], dict(left=left)
        yield ops.scatter_add_rows_.default, [one[0], one[4], one[2], None], dict(alpha=0.5, left=left)
        yield ops.grass_step.default, one, dict(step=2, lr=0.1, left=left, **HYPER)
        yield ops.grass_step.tensor, one, dict(**tensors, left=left, **HYPER)
        yield ops.grass_step.list, [*lists, steps], dict(lr=tensors["lr"], left=left, **HYPER, **guards)
    for method in METHODS:
        yield ops.select_rows.default, [torch.rand(20)], dict(r=4, method=method, seed=3)


def test_opcheck():
    for op, args, hyper in sample_calls():
        torch.library.opcheck(op, tuple(args), hyper)


@pytest.mark.skipif(bool(backends.NATIVE_MISSING), reason=f"no native build: {backends.NATIVE_MISSING}")
def test_every_op_is_served_natively():
    for op, _, _ in sample_calls():
        name = str(op).removeprefix("lowrank.").removesuffix(".default")
        served = {row.implementation for row in backends.table() if (row.op, row.device) == (name, "cpu")}
        assert served == {"composition" if name == "row_norms" else "C++"}


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
