"""galore_step_8bit's launcher against the oracle: Triton around the codes' own op, which runs where the tensors are."""

import pytest
import torch

from lowrank_sys import reference
from lowrank_sys._ops.named_steps import bound
from lowrank_sys.kernels import configs, traffic
from lowrank_sys.kernels.step import step as kernel_step

ops = torch.ops.lowrank
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
galore_step_8bit = bound("galore_step_8bit", kernel_step)
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
