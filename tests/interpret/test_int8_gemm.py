"""Products in INT8: the oracle's codes, so R to the rounding of its sums and W to that of its own; and their traffic."""

import pytest
import torch
from lanes import usual

from lowrank_sys import reference
from lowrank_sys._ops.named_steps import bound
from lowrank_sys.kernels import configs, int8_gemm, traffic
from lowrank_sys.kernels.back_project import back_project_
from lowrank_sys.kernels.project import project
from lowrank_sys.kernels.step import step as kernel_step

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
SHAPES = pytest.mark.parametrize("shape", [(520, 200, 8), (100, 530, 33), (63, 40, 1), (270, 140, 260), (80, 96, 130)], ids=str)


@pytest.fixture(params=[1, 6], ids=["one-processor", "split"])
def card(request, device, monkeypatch):
    card = configs.Target(80, request.param)
    monkeypatch.setattr(configs, "target", lambda _: card)
    return card


@SIDES
@pytest.mark.parametrize("columns", [True, False], ids=["columns", "rows"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_codes_are_the_oracles(lane, meter, columns, dtype, left):
    x = torch.randn(530, 70, generator=torch.Generator().manual_seed(0)).to(dtype).to(lane.device)
    x[:256, 3], x[300, 5], x[10, 6], x[:, 7] = 0, torch.nan, -torch.inf, 1e-42
    x = x if left else x.T.contiguous()
    codes, scale = int8_gemm.quantized(x, columns=columns)
    want, want_scale = reference.int8_gemm.quantized(x.T if columns else x)
    assert torch.equal(scale.nan_to_num(-1), want_scale.nan_to_num(-1)) and want_scale.isnan().any()
    depth = codes.shape[1]
    want = want.flatten(1)[:, :depth]
    usable = scale.isfinite().repeat_interleave(256, 1)[:, :depth]
    assert torch.equal(codes.double()[usable], want[usable])
    (launch,) = meter.launches
    for name, row in traffic.quantize_int8(*codes.shape, dtype=dtype).items():
        assert meter.bytes(launch, name) == row, name


@SIDES
@SHAPES
@pytest.mark.parametrize("dtypes", usual([(BF16, FP16)], ((FP32, FP32),)), ids=str)
def test_project(lane, meter, card, shape, dtypes, left):
    m, n, r = shape
    case = lane.case(m, n, r, left, dtypes[0], *dtypes)
    got = project(case.grad, case.basis, left=left, int8_gemm=True)
    want = reference.project(case.grad, case.basis, left=left, int8_gemm=True)
    lane.assert_close("R", got, want, rtol=1e-6, atol=1e-6 * want.abs().max().item())
    case.check_guards()
    _, launch = meter.launches
    rows = traffic.project_int8(m, n, r, left=left, grad=dtypes[0], card=card)
    for name in launch.counts:
        if name not in ("scalars", "counters"):
            assert meter.bytes(launch, name) == rows[name], name


@SIDES
@SHAPES
@pytest.mark.parametrize("dtype", usual([FP32, BF16], FP16), ids=str)
def test_back_project(lane, meter, shape, dtype, left):
    m, n, r = shape
    case = lane.case(m, n, r, left, dtype, dtype, dtype)
    want = case.param.clone()
    back_project_(case.param, case.low_rank, case.basis, alpha=0.5, beta=0.25, left=left, int8_gemm=True)
    reference.back_project_(want, case.low_rank, case.basis, alpha=0.5, beta=0.25, left=left, int8_gemm=True)
    lane.assert_close("W", case.param, want, rtol=torch.finfo(dtype).eps, atol=1e-6 * want.abs().max().item())
    case.check_guards()
    rows = traffic.back_project_int8_gemm(m, n, r, param=dtype)
    for name in meter.launches[-1].counts:
        if name != "scalars":
            assert meter.bytes(meter.launches[-1], name) == rows[name], name


@SIDES
@pytest.mark.parametrize("shape", [(520, 200, 8), (80, 96, 130)], ids=str)
@pytest.mark.parametrize("projected", [False, True], ids=["galore_step", "subspace_step"])
def test_step(lane, card, shape, projected, left):
    """The oracle's but where X falls beside another code: then by one code of its channel."""
    case = lane.case(*shape, left)
    gradient = "low_rank" if projected else "grad"
    want = [tensor.clone() for tensor in case.tensors(gradient)]
    form = "subspace_step" if projected else "galore_step"
    bound(form, kernel_step)(*case.tensors(gradient), step=2, lr=1e-2, left=left, int8_gemm=True, **lane.hyper)
    reference.named(form)(*want, step=2, lr=1e-2, left=left, int8_gemm=True, **lane.hyper)
    if not projected:  # whose sums may be in another order
        for name, moment in (("exp_avg", want[3]), ("exp_avg_sq", want[4])):
            lane.assert_close(name, getattr(case, name), moment, rtol=1e-5, atol=1e-6)
    off = (case.param - want[0]).abs()
    one_code = 0.25e-2 * 20 / 127 * want[2].abs().max()
    assert (off <= 1e-6 + 2 * one_code).all()
    assert (off.amax(0 if left else 1) > 2e-6).float().mean() <= 0.1
    case.check_guards()


@SIDES
def test_bad_channels_and_lists(lane, card, left):
    cases = [lane.case(70, 300, 6, left, seed=seed) for seed in range(3)]
    (cases[1].grad if left else cases[1].grad.T)[5, 9] = torch.nan
    steps, skipped = [torch.zeros((), device=lane.device) for _ in cases], torch.tensor(0, device=lane.device)
    before = [case.param.clone() for case in cases]
    bound("galore_step.list", kernel_step)(
        *map(list, zip(*(case.tensors() for case in cases))),
        steps,
        lr=torch.tensor(1e-2),
        left=left,
        int8_gemm=True,
        skipped=skipped,
        **lane.hyper,
    )
    assert skipped == cases[1].param.shape[0 if left else 1]
    for i, case in enumerate(cases):
        moved = (case.param != before[i]).any(0 if left else 1)
        assert moved.tolist() == [not (i == 1 and c == 9) for c in range(len(moved))]
        case.check_guards()
