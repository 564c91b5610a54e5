"""How a projection is taken: small tiles, large ones whose rule runs on pieces, or cuBLAS, and what decides."""

import pytest
import torch

from lowrank_sys import reference
from lowrank_sys._ops.named_steps import bound
from lowrank_sys._ops.workspace import split_parts
from lowrank_sys.kernels import configs, roofline, traffic
from lowrank_sys.kernels.project import counters_of, launch_project
from lowrank_sys.kernels.step import step

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
LARGE = pytest.mark.parametrize("arch", [80, 90], ids=["128x128", "128x256"])
SHAPE = (176, 288, 144)  # no multiple of a tile
H100 = configs.Target(90, 132)


@pytest.fixture
def force(monkeypatch):
    """Every projection is taken by the plan that is given."""
    return lambda plan: monkeypatch.setattr(configs, "plan_project", lambda *args, **kwargs: plan)


def large(arch, left, *, splits, adam):
    m, n, r = SHAPE
    config = configs.of_arch(configs.TABLES, arch)["project", "large"][128]
    channels, depth = (n, m) if left else (m, n)
    tiles = configs.cdiv(channels, config["BLOCK_C"]) * configs.cdiv(r, config["BLOCK_R"])
    chunk = configs.cdiv(configs.cdiv(depth, config["BLOCK_D"]), splits) * config["BLOCK_D"]
    return configs.Plan(config, tiles, splits, chunk, splits if splits > 1 or adam else 0)


@SIDES
@LARGE
@pytest.mark.parametrize("splits", [1, 2])
def test_adam_on_pieces_of_a_large_tile(lane, meter, force, arch, splits, left):
    force(large(arch, left, splits=splits, adam=True))
    m, n, r = SHAPE
    case = lane.case(m, n, r, left, BF16, BF16, BF16)
    before = case.param.clone()
    bound("galore_step", step)(*case.tensors(), step=3, lr=1e-2, left=left, **lane.hyper)
    case.oracle(step=3)
    case.check(before)
    launch = next(launch for launch in meter.launches if launch.kernel == "project_kernel")
    rows = traffic.project(m, n, r, left=left, grad=BF16, basis=BF16, card=H100, out=BF16, moments=True)
    for name in launch.counts.keys() - {"scalars", "counters"}:
        assert meter.bytes(launch, name) == rows.pop(name), name
    assert all(row == (0, 0) for row in rows.values()), rows


@SIDES
@LARGE
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("squares", [False, True])
def test_a_large_tile(lane, force, arch, splits, squares, left):
    force(large(arch, left, splits=splits, adam=False))
    m, n, r = SHAPE
    case = lane.case(m, n, r, left, BF16, BF16, BF16)
    out = torch.empty_like(case.exp_avg)
    buffer = (lambda parts: torch.empty(parts, n if left else m, device=lane.device)) if squares else None
    got = launch_project([case.grad], [case.basis], [out], left=left, counters=counters_of(lane.device), squares=buffer)
    lane.assert_close("R", out, reference.project(case.wants["grad"], case.wants["basis"], left=left), rtol=1e-6, atol=6e-6)
    if squares:
        lane.assert_close("squares", got.sum(0), case.wants["grad"].square().sum(0 if left else 1), rtol=2e-6, atol=0.0)


@SIDES
def test_cublas_with_adam_behind_it(lane, force, left):
    force(configs.Plan(None, 1, 1, 64))
    case = lane.case(*SHAPE, left, BF16, BF16, BF16)
    before = case.param.clone()
    bound("galore_step", step)(*case.tensors(), step=3, lr=1e-2, left=left, **lane.hyper)
    case.oracle(step=3)
    case.check(before)


@SIDES
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_cublas_alone(lane, force, dtype, left):
    """Its result is fp32, whatever the operands."""
    force(configs.Plan(None, 1, 1, 64))
    case = lane.case(*SHAPE, left, dtype, dtype, dtype)
    out = torch.empty_like(case.exp_avg)
    launch_project([case.grad], [case.basis], [out], left=left, counters=counters_of(lane.device))
    lane.assert_close("R", out, reference.project(case.wants["grad"], case.wants["basis"], left=left), rtol=1e-6, atol=6e-6)


def plan(m, n, r, *, left=True, dtype=BF16, basis=None, library=True, **asked):
    return configs.plan_project(m, n, r, left=left, dtypes=(dtype, basis or dtype), card=H100, library=library, **asked)


@SIDES
def test_what_a_plan_of_a_h100_is(left):
    """Small tiles with the rule behind them at a small rank, large ones above, cuBLAS where the cache would bound ours."""
    square = {"left": left, "adam": True}
    assert plan(4096, 4096, 64, **square).config["BLOCK_R"] == 64
    assert plan(4096, 4096, 128, **square).config["BLOCK_C"] == 64
    assert plan(4096, 4096, 256, **square).config["BLOCK_C"] == 256
    assert not plan(4096, 4096, 1024, left=left).fused
    assert not plan(*((4096, 11008) if left else (11008, 4096)), 512, **square).fused
    ours = plan(4096, 4096, 1024, library=False, **square)
    assert ours.config["BLOCK_C"] == 256 and ours.parts == ours.splits == 1
    # From r = 256 on a product is split, too, where its tiles do not fill the card.
    split = plan(4096, 4096, 256, library=False, left=left)
    assert split.splits > 1 and split.tiles * split.splits >= 0.75 * H100.multiprocessors


@SIDES
def test_what_cublas_is_not_asked_for(left):
    """Other types than one of 16 bits, sums of squares, codes, rows that are not aligned, and many small matrices."""
    big = (4096, 4096, 1024)
    for other in (
        plan(*big, left=left, dtype=FP32),
        plan(*big, left=left, basis=FP32),
        plan(*big, left=left, squares=True),
        plan(*big, left=left, int4=True),
        plan(4096, 4100, 1024, left=left),
        plan(4096, 4096, 1028, left=left),
        plan(512, 512, 256, left=left),
        plan(*big, left=left, library=False),
    ):
        assert other.fused
    assert plan(*big, left=left, int4=True).config["BLOCK_C"] == 64


@SIDES
@pytest.mark.parametrize("r", [128, 256, 512, 1024])
@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 11008), (11008, 4096)], ids=str)
def test_a_plan_is_never_worse_than_small_tiles(monkeypatch, shape, r, left):
    best = plan(*shape, r, left=left, adam=True)
    monkeypatch.setattr(configs, "plan_project", configs.plan_project.__wrapped__)
    monkeypatch.setitem(configs.TABLES[90], ("project", "large"), {128: configs.TABLES[90]["project", 16][128]})
    small = plan(*shape, r, left=left, adam=True, library=False)
    assert small.config["BLOCK_C"] == 64 and 0 < best.seconds <= small.seconds
    assert r < 256 or best.seconds < 0.9 * small.seconds


@SIDES
@pytest.mark.parametrize("arch", roofline.FIGURES)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("adam", [True, False])
def test_the_planner_knows_the_parts(arch, dtype, adam, left):
    """Scratch of a projection is at most what is counted beside the ops."""
    card = configs.Target(arch, roofline.FIGURES[arch].multiprocessors)
    for m, n in ((64, 100), (1024, 1024), (2048, 2048), (4096, 4096), (4096, 11008), (11008, 4096), (32000, 4096)):
        for r in (8, 64, 128, 256, 512, 1024):
            size = r * (n if left else m)
            best = configs.plan_project(m, n, r, left=left, dtypes=(dtype, dtype), card=card, adam=adam, library=True)
            copies = (best.parts if best.fused else adam) * configs.together(m, n, card)
            assert 4 * copies * size <= split_parts(torch.empty(m, n, dtype=dtype, device="meta"), size), (m, n, r, best)
