"""Bytes of the Gaussian products and of the step in every combination, launch by launch, against `lowrank_sys.kernels.traffic`."""

import pytest
import torch
from combinations import COMBINATIONS, GROUP, VARIANTS, Matrix, run, title
from lanes import usual

from lowrank_sys._ops.step import MOMENTS
from lowrank_sys.kernels import configs, gaussian, roofline, traffic

FP32, BF16 = torch.float32, torch.bfloat16
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
SHAPES = pytest.mark.parametrize("shape", [(150, 100, 5), (70, 130, 20)], ids=str)
WHICH = dict(seed=-5, step=3, parameter=7)
# The scalars of a step are a row of numbers, and counters as few.
SMALL = ("scalars", "counters", "skipped", "step")


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


TYPES = {"float": BF16, "int8": traffic.Int8(64), "dense": BF16, "int4": traffic.Int4(GROUP), "key": None}


@SIDES
@pytest.mark.parametrize("shape", usual([(150, 100, 5)], ((70, 130, 20),)), ids=str)
@pytest.mark.parametrize("policies", COMBINATIONS, ids=title)
def test_steps(lane, meter, card, shape, policies, left):
    """Launch by launch what each argument moves: G twice at most, W once each way, whatever it is stored in."""
    weight, basis, moments, remainder, projected = policies
    for variant in VARIANTS[remainder]:
        meter.launches.clear()
        extra = {key: variant[key] for key in ("limited", "gram") if key in variant}
        matrix = Matrix(lane, policies, *shape, left, seed=0, dtypes=(BF16, BF16, BF16), **extra)
        run([matrix], policies, left, variant, lane.device)
        which = {key: value for key, value in variant.items() if key != "scale_front"}
        kind = {"left": left, "weight": TYPES[weight], "grad": BF16, "basis": TYPES[basis], "card": card}
        assert_launches(meter, traffic.step(*shape, moments=moments, remainder=remainder, projected=projected, **kind, **which))
        *_, last = meter.launches
        assert (last.counts["weight"]["loaded"] == 1).all() and (last.counts["weight"]["stored"] == 1).all()


@SIDES
@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("remainder", ["scaled-gradient", "scaled-residual", "state-free"])
@pytest.mark.parametrize("shape", [(4096, 4096, 128), (4096, 11008, 128), (11008, 4096, 256)], ids=str)
def test_realistic_shapes_by_formula(remainder, moments, shape, left):
    """G is read twice (once more for each further tile of r of ours), W once each way; everything else stays under a quarter of G,
    but for parts of a split product that the cache holds."""
    m, n, r = shape
    h100, full = configs.Target(90, 132), m * n * 2
    kind = {"left": left, "weight": BF16, "grad": BF16, "basis": BF16, "card": h100}
    launches = traffic.step(m, n, r, remainder=remainder, moments=moments, **kind)
    total = {key: sum(sum(rows.get(key, (0, 0))) for rows in launches) for key in ("grad", "weight", "partials", "sums")}
    asked = {"left": left, "grad": BF16, "basis": BF16, "card": h100, "squares": remainder != "state-free"}
    times = -(-r // 128) if traffic.plan_project(m, n, r, **asked).fused else 1
    assert total["grad"] == full * (1 + times) and total["weight"] == 2 * full
    assert total["partials"] <= max(full / 4, roofline.FIGURES[90].cache << 20) and total["sums"] <= full / 100
