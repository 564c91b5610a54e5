"""galore_step_8bit's launcher against the oracle: Triton around the codes' own op, which runs where the tensors are."""

import pytest
import torch

from lowrank_sys import reference
from lowrank_sys._ops.named_steps import bound
from lowrank_sys.kernels import configs, traffic
from lowrank_sys.kernels.step import step as kernel_step
from lowrank_sys.reference.blockwise import dynamic_map

ops = torch.ops.lowrank
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
FORMS = {
    (False, None): bound("galore_step_8bit.list", kernel_step),
    (False, 32): bound("galore_step_8bit.int4", kernel_step),
    (True, None): bound("subspace_step_8bit.list", kernel_step),
    (True, 32): bound("subspace_step_8bit.int4", kernel_step),
}
galore_step_8bit = bound("galore_step_8bit", kernel_step)
EACH_FORM = pytest.mark.parametrize("form", FORMS, ids=["from G", "from G int4", "from R", "from R int4"])
MOMENTS = ("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")


def with_codes(lane, *args, **kwargs):
    """A lane case whose moments are codes, and the oracle's copies of them."""
    case = lane.case(*args, **kwargs)
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        codes, absmax = ops.quantize_blockwise(getattr(case, name), signed=signed, by_row=True)
        case.put(name, codes)
        case.put(f"{name}_absmax", absmax)
        case.wants |= {name: codes.cpu().clone(), f"{name}_absmax": absmax.cpu().clone()}
    return case


def tensors(case):
    return [getattr(case, name) for name in ("param", "grad", "basis", *MOMENTS)]


def lists(cases, form):
    """The lists of a form, of matrices whose basis is what INT4 keeps of it where the form wants that; no steps."""
    projected, group_size = form
    for case in cases:
        if group_size is not None:
            int4 = reference.quantize_int4(case.basis, group_size=group_size)
            case.put("basis", reference.dequantize_int4(*int4, d=case.basis.shape[0], group_size=group_size))
            for name, tensor in zip(("packed", "scale", "offset"), int4):
                case.put(name, tensor)
        if projected:
            r = reference.project(case.wants["grad"], case.wants["basis"], left=case.left)
            case.put("low_rank", r.float().to(case.param.device))
    basis = ("basis",) if group_size is None else ("packed", "scale", "offset")
    names = ("param", "low_rank" if projected else "grad", *basis, *MOMENTS)
    return [[getattr(case, name) for case in cases] for name in names]


def options(form):
    return {} if form[1] is None else {"group_size": form[1]}


def oracle(lane, case, *, step, grad_scale=1.0):
    want = case.wants
    reference.named("galore_step_8bit")(
        want["param"],
        want["grad"] * grad_scale,
        want["basis"],
        *(want[name] for name in MOMENTS),
        step=step,
        lr=1e-2,
        left=case.left,
        **lane.hyper,
    )


def check(lane, case, before):
    """Codes are the oracle's, or few neighbours where R differs in its last bits; weights as in the other steps."""
    want = case.wants
    for name in ("exp_avg", "exp_avg_sq"):
        codes = getattr(case, name).cpu().int() - want[name].int()
        assert codes.numel() == 0 or codes.abs().max() <= 1, name
        # 255 midpoints with fp32 rounding errors of sums of depth 100 around them: a few in a thousand values.
        assert (codes != 0).sum() <= 0.002 * codes.numel() + 3, name
        lane.assert_close(f"{name}_absmax", getattr(case, f"{name}_absmax"), want[f"{name}_absmax"], rtol=1e-5, atol=1e-6)
    moved = (want["param"] - before.double().cpu()).abs().max().item() if before.numel() else 0.0
    relative = 1e-5 if case.basis.dtype == FP32 else torch.finfo(case.basis.dtype).eps
    lane.assert_close("param", case.param, want["param"], rtol=torch.finfo(case.param.dtype).eps, atol=max(relative * moved, 1e-7))
    case.check_guards()


@SIDES
@pytest.mark.parametrize("types", [(FP32, FP32, FP32), (BF16, BF16, BF16), (FP16, BF16, FP32)], ids=str)
@pytest.mark.parametrize("shape", [(63, 100, 33), (130, 140, 16), (1, 70, 1), (0, 12, 3), (12, 0, 3)], ids=str)
def test_galore_step_8bit(lane, shape, types, left):
    case = with_codes(lane, *shape, left, *types)
    before = case.param.clone()
    galore_step_8bit(*tensors(case), step=3, lr=1e-2, left=left, **lane.hyper)
    oracle(lane, case, step=3)
    check(lane, case, before)


@SIDES
@EACH_FORM
def test_list(lane, form, left):
    """Matrices of several shapes, two of which share launches; steps advance; grad_scale multiplies."""
    shapes = [(63, 100, 7), (60, 40, 5), (63, 100, 7)]
    cases = [with_codes(lane, *shape, left, seed=i) for i, shape in enumerate(shapes)]
    befores = [case.param.clone() for case in cases]
    steps = [torch.tensor(float(i), device=lane.device) for i in (0, 4, 9)]
    skipped = torch.zeros((), dtype=torch.int64, device=lane.device)
    FORMS[form](
        *lists(cases, form),
        steps,
        lr=torch.tensor(1e-2),
        left=left,
        **options(form),
        grad_scale=torch.tensor([0.5], device=lane.device),
        found_inf=torch.zeros((), device=lane.device),
        skipped=skipped,
        **lane.hyper,
    )
    assert [step.item() for step in steps] == [1.0, 5.0, 10.0] and skipped.item() == 0
    for case, before, step in zip(cases, befores, steps):
        oracle(lane, case, step=step.item(), grad_scale=0.5)
        check(lane, case, before)


@SIDES
@EACH_FORM
def test_nonfinite(lane, form, left):
    """A bad channel keeps its weights, and its decoded moments within their new blocks' gaps; its weights are counted."""
    case = with_codes(lane, 60, 70, 9, left)
    before = case.param.clone()
    moments = [getattr(case, name).clone() for name in MOMENTS]
    bad = [2, 59]
    grad = case.grad.clone()
    for channel in bad:
        grad[(3, channel) if left else (channel, 3)] = float("nan")
    case.put("grad", grad)
    skipped = torch.zeros((), dtype=torch.int64, device=lane.device)
    FORMS[form](
        *lists([case], form),
        [torch.tensor(2.0, device=lane.device)],
        lr=torch.tensor(1e-2),
        left=left,
        skipped=skipped,
        **options(form),
        **lane.hyper,
    )
    oracle(lane, case, step=3)
    check(lane, case, before)
    assert skipped.item() == 2 * (60 if left else 70)
    index = (slice(None), bad) if left else (bad, slice(None))
    assert torch.equal(case.param[index], before[index])
    for i, signed in enumerate((True, False)):
        now = ops.dequantize_blockwise(getattr(case, MOMENTS[i]), getattr(case, MOMENTS[i + 2]), signed=signed)
        then = ops.dequantize_blockwise(moments[i], moments[i + 2], signed=signed)
        most = max(getattr(case, MOMENTS[i + 2]).max().item(), moments[i + 2].max().item())
        assert (now - then)[index].abs().max() <= dynamic_map(signed).diff().max() / 2 * most * 1.001


@SIDES
@EACH_FORM
def test_found_inf(lane, form, left):
    case = with_codes(lane, 60, 40, 5, left)
    case.grad.fill_(float("nan"))
    arguments = lists([case], form)
    before = [tensor.clone() for tensor in tensors(case)]
    step, skipped = torch.tensor(4.0, device=lane.device), torch.zeros((), dtype=torch.int64, device=lane.device)
    FORMS[form](
        *arguments,
        [step],
        lr=torch.tensor(1e-2, device=lane.device),
        left=left,
        skipped=skipped,
        found_inf=torch.ones(1, device=lane.device),
        **options(form),
        **lane.hyper,
    )
    assert step.item() == 4.0 and skipped.item() == 0
    for i in (0, 3, 4, 5, 6):
        assert torch.equal(tensors(case)[i], before[i])


@SIDES
def test_traffic(lane, meter, left, monkeypatch):
    """Beside the codes' op: G once per tile of r, W once each way, R once out in fp32 and X once per tile in its type."""
    card = configs.Target(80, 6)
    monkeypatch.setattr(configs, "target", lambda _: card)
    case = with_codes(lane, 208, 144, 16, left, BF16, BF16, BF16)
    galore_step_8bit(*tensors(case), step=1, lr=1e-2, left=left, **lane.hyper)
    scalars, first, second = meter.launches
    assert scalars.kernel == "scalars_kernel"
    wanted = traffic.step(208, 144, 16, left=left, weight=BF16, grad=BF16, basis=BF16, moments="8bit", card=card)
    for launch, rows in zip((first, second), wanted):
        for name in launch.counts:
            if name not in ("scalars", "counters"):
                assert meter.bytes(launch, name) == rows.pop(name), name
        assert all(row == (0, 0) for row in rows.values()), rows
