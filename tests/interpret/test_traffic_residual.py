"""Bytes of the Gaussian products and of the steps with a residual, launch by launch, against `lowrank_sys.kernels.traffic`."""

import pytest
import torch

from lowrank_sys.kernels import configs, gaussian, residual, roofline, traffic

FP32, BF16 = torch.float32, torch.bfloat16
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
SHAPES = pytest.mark.parametrize("shape", [(150, 100, 5), (70, 130, 20)], ids=str)
WHICH = dict(seed=-5, step=3, parameter=7)
# The scalars of a step are a row of numbers, and counters as few.
SMALL = ("scalars", "counters", "skipped")


@pytest.fixture(autouse=True)
def card(device, monkeypatch):
    card = configs.Target(80, 6)
    monkeypatch.setattr(configs, "target", lambda _: card)
    return card


def assert_launches(meter, launches):
    """Beside the scalars of a step."""
    counted = [launch for launch in meter.launches if launch.kernel != "scalars_kernel"]
    assert len(counted) == len(launches)
    for launch, rows in zip(counted, launches):
        names = {name for name in launch.counts if name not in SMALL}
        for name in names | rows.keys():
            assert meter.bytes(launch, name) == rows.get(name, (0, 0)), (launch.kernel, name)


@SIDES
@SHAPES
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_gaussian_products(lane, meter, card, shape, dtype, left):
    m, n, r = shape
    case = lane.case(m, n, r, left, dtype, dtype, dtype)
    out, d = torch.empty_like(case.basis), m if left else n
    gaussian.gaussian_basis_(out, **WHICH, first=3)
    gaussian.gaussian_project(case.grad, rank=r, left=left, first=3, **WHICH)
    gaussian.gaussian_back_project_(case.param, case.low_rank, left=left, first=3, **WHICH)
    assert_launches(
        meter,
        [
            traffic.gaussian_basis(d, r, out=dtype),
            *traffic.gaussian_project(m, n, r, left=left, grad=dtype, card=card),
            *traffic.gaussian_back_project(m, n, r, left=left, param=dtype, card=card),
        ],
    )


def numbers(lane):
    return {key: value for key, value in lane.hyper.items() if key != "scale"} | dict(step=2, lr=0.1)


@SIDES
@SHAPES
@pytest.mark.parametrize("how", ["stored", "gaussian", "tensor", "free"])
def test_apollo(lane, meter, card, shape, how, left):
    case = lane.case(*shape, left, BF16, BF16, BF16)
    basis = torch.tensor([-5, 3, 7, 0], device=lane.device) if how == "gaussian" else case.basis
    limiter = None if how == "free" else torch.tensor(0.8, device=lane.device)
    residual.apollo_step(
        case.param,
        case.grad,
        basis,
        case.exp_avg,
        case.exp_avg_sq,
        limiter,
        scale=2.0,
        left=left,
        per_tensor=how == "tensor",
        **numbers(lane),
    )
    assert_launches(
        meter,
        traffic.apollo_step(
            *shape,
            left=left,
            param=BF16,
            grad=BF16,
            basis=None if how == "gaussian" else BF16,
            card=card,
            per_tensor=how == "tensor",
            limited=how != "free",
        ),
    )


@SIDES
@SHAPES
@pytest.mark.parametrize("gram", [False, True])
def test_fira(lane, meter, card, shape, gram, left):
    case = lane.case(*shape, left)
    products = case.basis.T @ case.basis if gram else None
    residual.fira_step(
        case.param,
        case.grad,
        case.basis,
        case.exp_avg,
        case.exp_avg_sq,
        torch.tensor(0.8, device=lane.device),
        products,
        alpha=0.25,
        left=left,
        **numbers(lane),
    )
    assert_launches(meter, traffic.fira_step(*shape, left=left, param=FP32, grad=FP32, basis=FP32, card=card, gram=gram))


@SIDES
@SHAPES
@pytest.mark.parametrize("sign", [False, True])
def test_frugal(lane, meter, card, shape, sign, left):
    case = lane.case(*shape, left)
    residual.frugal_step(*case.tensors(), scale=1.0, residual_scale=0.1, sign=sign, left=left, **numbers(lane))
    assert_launches(meter, traffic.frugal_step(*shape, left=left, param=FP32, grad=FP32, basis=FP32, card=card, sign=sign))


@SIDES
@pytest.mark.parametrize("name", ["apollo_step", "fira_step", "frugal_step"])
@pytest.mark.parametrize("shape", [(4096, 4096, 128), (4096, 11008, 128), (11008, 4096, 256)], ids=str)
def test_realistic_shapes_by_formula(name, shape, left):
    """G is read twice (once more for each further tile of r of ours), W once each way; everything else stays under a quarter of G,
    but for parts of a split product that the cache holds."""
    m, n, r = shape
    h100, full = configs.Target(90, 132), m * n * 2
    launches = getattr(traffic, name)(m, n, r, left=left, param=BF16, grad=BF16, basis=BF16, card=h100)
    total = {key: sum(sum(rows.get(key, (0, 0))) for rows in launches) for key in ("grad", "param", "partials", "sums")}
    asked = {"left": left, "grad": BF16, "basis": BF16, "card": h100, "squares": name != "frugal_step"}
    times = -(-r // 128) if traffic.plan_project(m, n, r, **asked).fused else 1
    assert total["grad"] == full * (1 + times) and total["param"] == 2 * full
    assert total["partials"] <= max(full / 4, roofline.FIGURES[90].cache << 20) and total["sums"] <= full / 100
