"""APOLLO, Fira and FRUGAL: the launchers against the oracle in fp64, and G and W read as often as promised."""

import pytest
import torch

from lowrank_sys import reference
from lowrank_sys._ops.named_steps import bound
from lowrank_sys.kernels import common, configs
from lowrank_sys.kernels.channels import launch_sums
from lowrank_sys.kernels.coefficient import room_for_coefficients
from lowrank_sys.kernels.project import counters_of
from lowrank_sys.kernels.step import step as kernel_step

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
METHODS = {
    "apollo": ("apollo", dict(scale=1.5)),
    "apollo-tensor": ("apollo", dict(scale=4.0, per_tensor=True, scale_front=True)),
    "apollo-free": ("apollo", dict(scale=1.0)),
    "apollo-gaussian": ("apollo", dict(scale=1.0)),
    "fira": ("fira", dict(alpha=0.25)),
    "fira-gram": ("fira", dict(alpha=0.5)),
    "frugal": ("frugal", dict(scale=0.5, residual_scale=0.1, sign=True)),
    "frugal-sgd": ("frugal", dict(scale=0.5, residual_scale=0.1, sign=False)),
}
EVERY = pytest.mark.parametrize("method", METHODS)


class Step:
    """A case of the lane with what a method adds to it."""

    def __init__(self, lane, method, *shape, left, dtypes=(FP32, FP32, FP32)):
        self.lane, self.method = lane, method
        self.name, extra = METHODS[method]
        self.hyper = {key: value for key, value in lane.hyper.items() if key != "scale"} | extra | {"left": left}
        self.case = case = lane.case(*shape, left, *dtypes)
        if self.name == "fira" and method != "fira-gram" and case.basis.shape[0] >= case.r:
            case.put("basis", torch.linalg.qr(case.basis.float())[0].contiguous().to(case.basis.dtype))
        if method == "apollo-gaussian":
            case.put("basis", torch.tensor([-7, 3, 11, 5], device=lane.device))
            case.wants["basis"] = case.basis.cpu().clone()
        self.extras = []
        if self.name != "frugal":
            self.extras.append(None if "free" in method else torch.tensor(0.8, device=lane.device))
        if self.name == "fira":
            b = case.wants["basis"].float()
            self.extras.append((b.T @ b).to(lane.device) if method == "fira-gram" else None)
        self.wants = [t if t is None else t.double().cpu() for t in self.extras]

    def run(self, **numbers):
        bound(f"{self.name}_step", kernel_step)(*self.case.tensors(), *self.extras, **self.hyper, **numbers)

    def run_list(self, steps, **guards):
        extras = [[] if t is None else [t] for t in self.extras]
        bound(f"{self.name}_step.list", kernel_step)(
            *([t] for t in self.case.tensors()), *extras, steps, lr=torch.tensor(0.1), **self.hyper, **guards
        )

    def oracle(self, *, step, grad_scale=1.0):
        want = self.case.wants
        reference.named(f"{self.name}_step")(
            want["param"],
            want["grad"] * grad_scale,
            want["basis"],
            want["exp_avg"],
            want["exp_avg_sq"],
            *self.wants,
            step=step,
            lr=0.1,
            **self.hyper,
        )

    def check(self, before):
        case = self.case
        depth, dtype = case.param.shape[0 if case.left else 1], case.param.dtype
        for name in ("exp_avg", "exp_avg_sq"):
            self.lane.assert_close(name, getattr(case, name), case.wants[name], rtol=4e-6, atol=2e-6 * max(1, depth) ** 0.5)
        if self.extras and self.extras[0] is not None:
            self.lane.assert_close("limiter", self.extras[0], self.wants[0], rtol=1e-5, atol=0)
        moved = (case.wants["param"] - before.double().cpu()).abs().max().item()
        relative = 1e-5 * case.r**0.5 if case.basis.dtype in (FP32, torch.int64) else torch.finfo(case.basis.dtype).eps
        got = case.param.double().cpu()
        if self.method == "frugal":
            # The sign is free where the residual is within rounding of zero.
            want = case.wants
            r = want["basis"].T @ want["grad"] if case.left else want["grad"] @ want["basis"]
            left_over = want["grad"] - (want["basis"] @ r if case.left else r @ want["basis"].T)
            got = torch.where(left_over.abs() < 1e-4, want["param"], got)
        self.lane.assert_close("param", got, case.wants["param"], rtol=torch.finfo(dtype).eps, atol=max(relative * moved, 1e-6))
        case.check_guards()


@SIDES
@EVERY
@pytest.mark.parametrize("shape", [(63, 100, 7), (150, 70, 33), (1, 70, 1)], ids=str)
def test_step(lane, shape, method, left):
    step = Step(lane, method, *shape, left=left)
    before = step.case.param.clone()
    step.run(step=3, lr=0.1)
    if step.name == "fira" and step.case.basis.shape[0] <= step.case.r:
        return  # a residual of nothing but rounding: its norm has no digits
    step.oracle(step=3)
    step.check(before)


@SIDES
@EVERY
@pytest.mark.parametrize("dtypes", [(BF16, BF16, BF16), (FP16, FP32, BF16)], ids=str)
def test_types(lane, dtypes, method, left):
    step = Step(lane, method, 64, 80, 16, left=left, dtypes=dtypes)
    before = step.case.param.clone()
    step.run(step=3, lr=0.1)
    step.oracle(step=3)
    step.check(before)


@EVERY
def test_split_does_not_matter(lane, monkeypatch, method):
    results = []
    for multiprocessors in (1, 8, 8):
        monkeypatch.setattr(configs, "target", lambda _, count=multiprocessors: configs.Target(80, count))
        step = Step(lane, method, 400, 40, 5, left=True)
        before = step.case.param.clone()
        step.run(step=2, lr=0.1)
        step.oracle(step=2)
        step.check(before)
        results.append(step.case.param.clone())
    assert torch.equal(results[1], results[2])


@EVERY
def test_traffic(lane, meter, method):
    """G is read twice, W read and written once, and no other argument has their size."""
    step = Step(lane, method, 150, 140, 5, left=True)
    step.run(step=2, lr=0.1)
    full = {"grad": 0, "weight": 0}
    for launch in meter.launches:
        for name, counts in launch.counts.items():
            if name in full and counts["loaded"].size == 150 * 140:
                full[name] += counts["loaded"]
                assert name != "weight" or (counts["stored"] == 1).all()
            else:
                assert counts["loaded"].size <= 4 * 150 * 5 + 512, name
    assert (full["grad"] == 2).all() and (full["weight"] == 1).all()


@pytest.mark.parametrize("per_tensor", [False, True], ids=["channel", "tensor"])
@pytest.mark.parametrize("limiter", [None, 0.0, 1e3, 1e-3], ids=["free", "first", "slack", "tight"])
def test_coefficients_of_many_blocks(lane, per_tensor, limiter):
    """Several programs of channels, of any size that fp32 holds; one is not usable. A second launch finds the counters at 0."""
    channels, draw = 9 * configs.RULE["BLOCK_C"] + 5, torch.Generator().manual_seed(0)
    update, sums = torch.rand(1, channels, generator=draw) + 0.5, torch.rand(2, channels, generator=draw) + 0.5
    update[0, 1:4], sums[:, 1], sums[:, 2] = torch.tensor([0.0, 3e18, torch.nan]), 0.0, 1e38
    sums[0, 4] = 1e-40
    scalars = torch.zeros(1, 8)
    scalars[0, common.GRAD_SCALE.value], scalars[0, common.ACTIVE.value] = 0.5, 1
    for _ in range(2):
        n, r, left_over = (torch.where(update[0].isnan(), 0, x) for x in (update[0].double().square(), *sums.double()))
        s = (n.sum().sqrt() / (r.sum().sqrt() + 1e-8)).expand_as(n) if per_tensor else n.sqrt() / (r.sqrt() + 1e-8)
        norm = 1.5 * (s * s * left_over).sum().sqrt().item()
        kept = None if limiter is None else torch.tensor(limiter * norm, dtype=FP32, device=lane.device)
        divisor = max(norm / (limiter * norm + 1e-8), 1.01) / 1.01 if limiter else 1.0
        counters = counters_of(lane.device)
        numbers = {"growth": 1.01, "front": 1.5, "behind": 2.0, "per_tensor": per_tensor}
        room = room_for_coefficients(channels, kept, counters, lane.device, **numbers)
        launch_sums(update.to(lane.device), sums.to(lane.device), scalars.to(lane.device), left=True, room=room)
        want = torch.where(update[0].isnan(), torch.nan, 1.5 * s * 2.0 * 0.5 / divisor)
        lane.assert_close("coefficients", room["coefficients"], want, rtol=2e-6, atol=0)
        assert not counters.any()
        if limiter is not None:
            lane.assert_close("limiter", kept.reshape(1), torch.tensor([norm / divisor]), rtol=2e-6, atol=0)


@SIDES
@pytest.mark.parametrize("method", [method for method in METHODS if method.startswith("fira")])
def test_a_channel_whose_squares_overflow(lane, method, left):
    """It is not usable, though its R, which knows nothing of that row, is."""
    step = Step(lane, method, 60, 70, 5, left=left)
    case, grad = step.case, step.case.grad if left else step.case.grad.T
    case.basis[3] = 0
    grad[3, 2] = 1e25
    before = [t.clone() for t in (case.param, case.exp_avg, case.exp_avg_sq)]
    skipped = torch.zeros((), dtype=torch.int64, device=lane.device)
    step.run_list([torch.tensor(2.0, device=lane.device)], skipped=skipped)
    assert skipped.item() == grad.shape[0]
    for then, now in zip(before, (case.param, case.exp_avg, case.exp_avg_sq)):
        same = (then == now) if left else (then == now).T
        assert same[:, 2].all() and now.isfinite().all() and not same[:, 3:].all(dim=0).any()
