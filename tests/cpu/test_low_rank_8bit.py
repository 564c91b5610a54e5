"""Low-rank steps with 8-bit moments from G and from R, on dense bases and on bases in INT4."""

import pytest
import torch
from cases.case import replace
from threads import threads

import lowrank_sys  # noqa: F401  registers the ops
from lowrank_sys import backends

ops = torch.ops.lowrank
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HYPER = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, scale=0.25)
SHAPES = [(63, 100, 7), (300, 130, 40), (1, 200, 1), (600, 515, 9)]

pytestmark = pytest.mark.skipif(bool(backends.NATIVE_MISSING), reason=f"no native build: {backends.NATIVE_MISSING}")


def same(a, b):
    """Equal bytes."""
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def assert_neighbours(got, want):
    """fp32 steps whose R may differ in its last bits, so that a code may be the neighbour now and then; a weight moves by
    lr * scale * |x| a code."""
    for a, b in zip(got[1:3], want[1:3]):
        apart = (a.int() - b.int()).abs()
        assert apart.max() <= 1 and (apart != 0).sum() <= 0.002 * apart.numel() + 2
    for a, b in zip(got[3:5], want[3:5]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
    torch.testing.assert_close(got[0], want[0], rtol=2.0**-22, atol=1e-4 * 0.025)


class Case:
    """One matrix: param, grad, a basis and the same one in INT4, and moments as codes."""

    def __init__(self, m, n, r, left, dtype=torch.float32, seed=0, group_size=64):
        draw = torch.Generator().manual_seed(seed)
        self.left, self.group_size, self.d = left, group_size, m if left else n
        self.param, self.grad = (torch.randn(m, n, generator=draw).to(dtype) for _ in range(2))
        basis = torch.randn(self.d, r, generator=draw) / self.d**0.5
        self.int4 = list(ops.quantize_int4(basis, group_size=group_size))
        self.dense = [ops.dequantize_int4(*self.int4, d=self.d, group_size=group_size)]
        shape = (r, n) if left else (m, r)
        first, first_absmax = ops.quantize_blockwise(torch.randn(shape, generator=draw), signed=True, by_row=True)
        second, second_absmax = ops.quantize_blockwise(torch.rand(shape, generator=draw) + 0.1, signed=False, by_row=True)
        self.moments, self.step = [first, second, first_absmax, second_absmax], torch.tensor(2.0)

    def low_rank(self, form):
        if form == "list":
            return ops.project(self.grad, *self.dense, left=self.left)
        return ops.project_int4(self.grad, *self.int4, left=self.left, group_size=self.group_size)

    def run(self, form, projected=False, lr=0.1, **guards):
        """Returns copies of what the step wrote: param, moments and step."""
        param, moments, step = self.param.clone(), replace(self.moments, torch.clone), self.step.clone()
        basis = self.dense if form == "list" else self.int4
        gradient = self.low_rank(form) if projected else self.grad
        op = getattr(getattr(ops, f"{'subspace' if projected else 'galore'}_step_8bit"), form)
        options = {} if form == "list" else {"group_size": self.group_size}
        op(
            [param],
            [gradient],
            *([x] for x in basis),
            *([x] for x in moments),
            [step],
            lr=torch.tensor(lr),
            left=self.left,
            **HYPER,
            **options,
            **guards,
        )
        return [param, *moments, step]


@SIDES
@pytest.mark.parametrize("form", ["list", "int4"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 20, 3), (20, 0, 3)], ids=str)
def test_from_r_is_from_g(shape, dtype, form, left):
    """project and the step from R: the bytes of the step from G, guards and all."""
    case = Case(*shape, left, dtype)
    guards = dict(grad_scale=torch.tensor([0.5]), found_inf=torch.tensor(0.0))
    for a, b in zip(case.run(form, **guards), case.run(form, projected=True, **guards)):
        assert same(a, b)


@SIDES
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int4_is_its_parts(shape, dtype, left):
    """project_int4, adam_8bit_low_rank_, back_project_int4_: the same bytes."""
    case = Case(*shape, left, dtype)
    whole = case.run("int4")
    r, moments, param = case.low_rank("int4"), replace(case.moments, torch.clone), case.param.clone()
    adam = {key: HYPER[key] for key in ("beta1", "beta2", "eps")}
    ops.adam_8bit_low_rank_([r], [r], *([x] for x in moments), [torch.tensor(3.0)], **adam, left=left)
    ops.back_project_int4_(param, r, *case.int4, alpha=-0.1 * 0.25, beta=1 - 0.1 * 0.1, left=left, group_size=64)
    assert all(map(same, whole[1:5], moments))
    assert torch.allclose(whole[0].float(), param.float(), rtol=torch.finfo(dtype).eps, atol=1e-7)  # lr is a double there


@SIDES
@pytest.mark.parametrize("projected", [False, True], ids=["from G", "from R"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int4_is_the_step_on_what_it_decodes_to(shape, projected, left):
    case = Case(*shape, left)
    dense, packed = case.run("list", projected), case.run("int4", projected)
    assert_neighbours(dense, packed)
    assert dense[5] == packed[5] == 3


def on_threads(run):
    """Results of run() on 1, 2 and 5 threads; each is the same at a second time."""
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(run())
            assert all(map(same, results[-1], run()))
    return results


@SIDES
@pytest.mark.parametrize("form", ["list", "int4"])
def test_no_thread_count_changes_moments_given_r(form, left):
    case = Case(600, 515, 40, left, torch.bfloat16)
    low_rank = case.low_rank(form)
    case.low_rank = lambda form: low_rank
    first, *others = on_threads(lambda: case.run(form, projected=True))
    for other in others:
        assert all(map(same, first[1:], other[1:]))
        torch.testing.assert_close(first[0], other[0], rtol=torch.finfo(torch.bfloat16).eps, atol=1e-7)  # behind a GEMM


@SIDES
@pytest.mark.parametrize("form", ["list", "int4"])
def test_thread_counts_round_the_products_of_a_step_alone(form, left):
    """On another number of threads torch's GEMM may give R other last bits, and a moment the neighbour of its code."""
    case = Case(600, 515, 40, left)
    first, *others = on_threads(lambda: case.run(form))
    for other in others:
        assert_neighbours(first, other)
