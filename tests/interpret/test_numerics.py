"""Every launcher against the oracle in fp64."""

import itertools

import pytest
import torch

from lowrank_sys import reference
from lowrank_sys._ops.named_steps import bound
from lowrank_sys.kernels import configs
from lowrank_sys.kernels import step as launcher
from lowrank_sys.kernels.back_project import back_project_
from lowrank_sys.kernels.project import project

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
galore_step, galore_step_list, subspace_step, subspace_step_list = (
    bound(form, launcher.step) for form in ("galore_step", "galore_step.list", "subspace_step", "subspace_step.list")
)

# Odd sizes, single rows and columns, every tile of the rank and two of them, r = min(m, n).
SHAPES = [
    (63, 100, 1),
    (63, 100, 16),
    (63, 100, 63),
    (129, 64, 17),
    (129, 64, 64),
    (1, 70, 1),
    (70, 1, 1),
    (257, 40, 33),
    (140, 150, 130),
    (144, 160, 128),
    (140, 160, 144),
    (1, 64, 16),
    (1000, 20, 4),
    (20, 1000, 4),
]
# Types of weight, gradient and basis.
DTYPES = [
    (BF16, BF16, BF16),
    (BF16, BF16, FP32),
    (FP32, BF16, BF16),
    (FP16, FP16, FP16),
    (FP32, FP32, BF16),
    (FP16, BF16, FP16),
    (BF16, FP32, FP32),
]
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])


def name(value):
    return "-".join(str(part).removeprefix("torch.") for part in value)


@SIDES
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_galore_step(lane, shape, left):
    case = lane.case(*shape, left)
    before = case.param.clone()
    galore_step(*case.tensors(), step=3, lr=1e-2, left=left, **lane.hyper)
    case.oracle(step=3)
    case.check(before)


@SIDES
@pytest.mark.parametrize("dtypes", DTYPES, ids=name)
@pytest.mark.parametrize("shape", [(63, 100, 33), (100, 160, 32)], ids=name)
def test_galore_step_types(lane, shape, dtypes, left):
    case = lane.case(*shape, left, *dtypes)
    before = case.param.clone()
    galore_step(*case.tensors(), step=3, lr=1e-2, left=left, **lane.hyper)
    case.oracle(step=3)
    case.check(before)


@SIDES
@pytest.mark.parametrize("dtypes", [(FP32, FP32, FP32), (BF16, BF16, BF16), (FP16, FP32, FP16)], ids=name)
@pytest.mark.parametrize("shape", [(63, 100, 33), (60, 70, 130), (1, 70, 1)], ids=name)
def test_subspace_step(lane, shape, dtypes, left):
    case = lane.case(*shape, left, *dtypes)
    before = case.param.clone()
    subspace_step(*case.tensors("low_rank"), step=3, lr=1e-2, left=left, **lane.hyper)
    case.oracle("low_rank", step=3)
    case.check(before)


@SIDES
@pytest.mark.parametrize("dtypes", [(FP32, FP32, FP32), *DTYPES], ids=name)
@pytest.mark.parametrize("shape", [(63, 100, 33), (60, 70, 130), (100, 160, 48)], ids=name)
def test_project(lane, shape, dtypes, left):
    case = lane.case(*shape, left, *dtypes)
    got = project(case.grad, case.basis, left=left)
    want = reference.project(case.wants["grad"], case.wants["basis"], left=left)
    assert got.dtype == FP32
    lane.assert_close("R", got, want, rtol=1e-6, atol=4e-7 * case.basis.shape[0] ** 0.5)
    case.check_guards()


@SIDES
@pytest.mark.parametrize("dtypes", [(FP32, FP32, FP32), *DTYPES], ids=name)
@pytest.mark.parametrize("shape", [(63, 100, 33), (65, 64, 144)], ids=name)
def test_back_project(lane, shape, dtypes, left):
    case = lane.case(*shape, left, *dtypes)
    back_project_(case.param, case.low_rank, case.basis, alpha=-0.5, beta=0.75, left=left)
    want = case.wants["param"]
    reference.back_project_(want, case.wants["low_rank"], case.wants["basis"], alpha=-0.5, beta=0.75, left=left)
    lane.assert_close("param", case.param, want, rtol=torch.finfo(case.param.dtype).eps, atol=2e-6 * case.r**0.5)
    case.check_guards()


def test_back_project_with_beta_0_does_not_depend_on_the_weight(lane):
    case = lane.case(8, 40, 4, True)
    case.param.fill_(float("nan"))
    back_project_(case.param, case.low_rank, case.basis, beta=0.0, left=True)
    assert case.param.isfinite().all()


def test_back_project_spreads_nan(lane):
    case = lane.case(8, 40, 4, True)
    case.low_rank[1, 5] = float("nan")
    back_project_(case.param, case.low_rank, case.basis, left=True)
    assert case.param[:, 5].isnan().all() and case.param.isnan().sum() == 8


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_store_rounds_to_nearest_even(lane, dtype):
    if not lane.interpreted:
        pytest.skip("a tf32x3 product does not return its operand to the last bit")
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    patterns = patterns[patterns.isfinite()].float()
    above = torch.nextafter(patterns, torch.tensor(torch.inf))
    middle = patterns / 2 + patterns.roll(1) / 2
    values = torch.cat((patterns, middle, above, torch.randn(5000), torch.tensor([3.4e38, 1e-44])))
    values = values[values.isfinite()]
    values = values[: values.numel() // 128 * 128].reshape(128, -1).to(lane.device)
    eye = torch.eye(128, device=lane.device)
    param = torch.zeros(values.shape, dtype=dtype, device=lane.device)
    back_project_(param, values, eye, left=True)
    assert torch.equal(param, values.to(dtype))
    # One product each, because 0 * inf is NaN.
    values = torch.tensor([[torch.inf, -torch.inf, torch.nan, 70000.0]], device=lane.device)
    param = torch.zeros(values.shape, dtype=dtype, device=lane.device)
    back_project_(param, values, eye[:1, :1].contiguous(), left=True)
    lane.assert_close("param", param, values.to(dtype), rtol=0, atol=0)


@SIDES
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("r", [5, 16])
def test_split_does_not_matter(lane, monkeypatch, r, dtype, left):
    """However a projection is split, R is the same up to the order of fp32 sums; the same split gives the same bits."""
    results = []
    for multiprocessors in (1, 4, 4, 40):
        monkeypatch.setattr(configs, "target", lambda _, count=multiprocessors: configs.Target(80, count))
        case = lane.case(*((400, 64, r) if left else (64, 400, r)), left, dtype, dtype, dtype)
        before = case.param.clone()
        galore_step(*case.tensors(), step=1, lr=1e-2, left=left, **lane.hyper)
        case.oracle(step=1)
        case.check(before)
        results.append(torch.cat([t.float().flatten() for t in (case.param, case.exp_avg, case.exp_avg_sq)]))
    assert torch.equal(results[1], results[2])


@SIDES
@pytest.mark.parametrize("projected", [False, True], ids=["grad", "low_rank"])
@pytest.mark.parametrize("basis", [FP32, BF16], ids=str)
def test_list(lane, projected, basis, left):
    """Several shapes in one call; steps advance; grad_scale multiplies; two steps in a row."""
    gradient = "low_rank" if projected else "grad"
    shapes = [(63, 100, 7), (300, 40, 5), (1, 9, 1)]
    cases = [lane.case(*shape, left, FP32, basis, basis, seed=i) for i, shape in enumerate(shapes)]
    steps = [torch.tensor(float(i), device=lane.device) for i in (0, 4, 9)]
    skipped = torch.zeros((), dtype=torch.int64, device=lane.device)
    function = subspace_step_list if projected else galore_step_list
    for _ in range(2):
        function(
            *map(list, zip(*(case.tensors(gradient) for case in cases))),
            steps,
            lr=torch.tensor(1e-2),
            left=left,
            grad_scale=torch.tensor([0.5], device=lane.device),
            found_inf=torch.zeros((), device=lane.device),
            skipped=skipped,
            **lane.hyper,
        )
    assert [step.item() for step in steps] == [2.0, 6.0, 11.0]
    assert skipped.item() == 0
    for case, first in zip(cases, (1, 5, 10)):
        before = case.param.new_zeros(()).expand_as(case.param)
        case.oracle(gradient, grad_scale=0.5, step=first)
        case.oracle(gradient, grad_scale=0.5, step=first + 1)
        case.check(before)


@SIDES
@pytest.mark.parametrize("projected", [False, True], ids=["grad", "low_rank"])
def test_matrices_of_one_shape_share_launches(lane, monkeypatch, projected, left):
    """Eleven small ones take launches of 8 and 3, filled up; each has the bits of a step of its own."""
    gradient = "low_rank" if projected else "grad"
    cases = [lane.case(70, 40, 5, left, seed=i) for i in range(11)]
    alone = [lane.case(70, 40, 5, left, seed=i) for i in range(11)]
    function, one = (subspace_step_list, subspace_step) if projected else (galore_step_list, galore_step)
    counts = []
    launch = launcher.launch_apply
    monkeypatch.setattr(
        launcher, "launch_apply", lambda weights, *args, **kwargs: (counts.append(len(weights)), launch(weights, *args, **kwargs))
    )
    steps = [torch.tensor(float(i), device=lane.device) for i in range(11)]
    function(*map(list, zip(*(case.tensors(gradient) for case in cases))), steps, lr=torch.tensor(1e-2), left=left, **lane.hyper)
    assert counts == [8, 3]
    for i, (case, other) in enumerate(zip(cases, alone)):
        one(*other.tensors(gradient), step=i + 1, lr=torch.tensor(1e-2), left=left, **lane.hyper)
        for name in ("param", "exp_avg", "exp_avg_sq"):
            assert torch.equal(getattr(case, name), getattr(other, name)), (i, name)
        case.check_guards()


# At r > 128 an overflow of a finite full gradient may skip a part of its channel's moments only: left out.
NAN, INF = float("nan"), float("inf")
NONFINITE = [
    (5, FP32, NAN),
    (5, FP32, INF),
    (5, FP32, -INF),
    (5, FP32, 2.0**66),
    (5, BF16, NAN),
    (130, FP32, NAN),
    (130, BF16, -INF),
]


@SIDES
@pytest.mark.parametrize(
    "projected, r, dtype, value",
    [(False, *row) for row in NONFINITE] + [(True, *row) for row in [*NONFINITE, (130, FP32, 2.0**66)]],
)
def test_nonfinite(lane, projected, r, dtype, value, left):
    """A channel that is not usable keeps its moments and its weights to the bit, and is counted; the others step."""
    gradient = "low_rank" if projected else "grad"
    case = lane.case(60, 70, r, left, dtype, dtype, dtype)
    case.basis.copy_(case.basis.abs().clamp(min=0.5))
    bad = [2, 59]
    for channel in bad:
        getattr(case, gradient)[(3, channel) if left else (channel, 3)] = value
    for tensor in ("basis", gradient):
        case.put(tensor, getattr(case, tensor).clone())
    before = [tensor.clone() for tensor in case.tensors(gradient)]
    step, skipped = torch.tensor(2.0, device=lane.device), torch.zeros((), dtype=torch.int64, device=lane.device)
    function = subspace_step_list if projected else galore_step_list
    function(
        *([tensor] for tensor in case.tensors(gradient)), [step], lr=torch.tensor(1e-2), left=left, skipped=skipped, **lane.hyper
    )
    case.oracle(gradient, step=3)
    case.check(before[0])
    assert skipped.item() == len(bad) * (60 if left else 70)
    for old, new in zip((before[0], before[3], before[4]), (case.param, case.exp_avg, case.exp_avg_sq)):
        index = (slice(None), bad) if left else (bad, slice(None))
        assert torch.equal(old[index], new[index])
        assert new.isfinite().all()


def test_numbers_and_tensors_agree(lane):
    """step and lr as numbers, CPU tensors and device tensors give the same bits."""
    results = []
    lr = torch.tensor(2.0**-7)
    for step, lr in ((3, 2.0**-7), (torch.tensor(3.0), lr), (torch.tensor(3.0, device=lane.device), lr.to(lane.device))):
        case = lane.case(20, 30, 4, True)
        galore_step(*case.tensors(), step=step, lr=lr, left=True, **lane.hyper)
        results.append(case.param.clone())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_first_steps_from_zero_moments(lane):
    """The first update of Adam is sign(R): bias corrections keep their digits at step 1."""
    case = lane.case(50, 60, 6, True)
    case.put("exp_avg", torch.zeros_like(case.exp_avg))
    case.put("exp_avg_sq", torch.zeros_like(case.exp_avg_sq))
    before = case.param.clone()
    galore_step(*case.tensors(), step=1, lr=1e-2, left=True, **lane.hyper)
    case.oracle(step=1)
    case.check(before)


@pytest.mark.parametrize("shape, left", [((0, 12, 3), True), ((0, 12, 3), False), ((12, 0, 3), True), ((12, 0, 3), False)])
def test_empty_shard(lane, shape, left):
    """No rows or no columns: the moments that exist still decay, and nothing is read."""
    case = lane.case(*shape, left)
    before = case.param.clone()
    galore_step(*case.tensors(), step=3, lr=1e-2, left=left, **lane.hyper)
    case.oracle(step=3)
    case.check(before)
    assert torch.equal(project(case.grad, case.basis, left=left), torch.zeros_like(case.exp_avg))


def test_empty_list(lane):
    galore_step_list([], [], [], [], [], [], lr=torch.tensor(0.1), left=True, **lane.hyper)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"grad": (slice(None), slice(1, None))}, "grad must have shape"),
        ({"basis": (slice(1, None),)}, "basis must have shape"),
        ({"exp_avg": (slice(1, None),)}, "exp_avg must have shape"),
    ],
)
def test_bad_arguments_are_named(lane, change, message):
    case = lane.case(20, 30, 4, True)
    for tensor, index in change.items():
        setattr(case, tensor, getattr(case, tensor)[index].contiguous())
    with pytest.raises(RuntimeError, match=message):
        galore_step(*case.tensors(), step=1, lr=1e-2, left=True, **lane.hyper)


def test_every_architecture_has_a_configuration():
    for arch, n, r, pair in itertools.product(
        (75, 80, 86, 87, 90, 103, 121, 130), (7, 64), (1, 16, 100, 128, 5000), ((BF16, BF16), (FP32, BF16))
    ):
        for kernel in ("project", "back_project"):
            assert configs.config_for(arch, kernel, n=n, r=r, dtypes=pair)["num_warps"] in (4, 8)
