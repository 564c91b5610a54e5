"""Products with a basis in INT4: unpacked in the kernels, against those of the dequantized basis."""

import pytest
import torch
import triton
import triton.language as tl
from lanes import usual

from lowrank_sys import reference
from lowrank_sys.kernels import basis as basis_kernels
from lowrank_sys.kernels import configs, traffic
from lowrank_sys.kernels.apply import launch_apply
from lowrank_sys.kernels.back_project import back_project_int4_
from lowrank_sys.kernels.basis import Int4Basis
from lowrank_sys.kernels.project import counters_of, launch_project, project_int4
from lowrank_sys.kernels.scalars import advance

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NARROW = {BF16: tl.bfloat16, FP16: tl.float16}
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
# Odd lengths, single rows, several groups in a tile and several tiles in a group, one and two tiles of the rank.
SHAPES = [
    (63, 100, 5, 32),
    (1, 70, 3, 64),
    (70, 1, 1, 32),
    (300, 80, 16, 256),
    (144, 160, 128, 32),
    (40, 257, 130, 32),
    (96, 96, 16, 1024),
]


def case_of(lane, m, n, r, group_size, left, param=FP32, grad=FP32, seed=0):
    """A case whose basis is what INT4 keeps of it, and that basis."""
    case = lane.case(m, n, r, left, param, grad, FP32, seed=seed)
    int4 = reference.quantize_int4(case.basis, group_size=group_size)
    case.put("basis", reference.dequantize_int4(*int4, d=case.basis.shape[0], group_size=group_size))
    for name, tensor in zip(("packed", "scale", "offset"), int4):
        case.put(name, tensor)
    return case, Int4Basis(case.packed, case.scale, case.offset, group_size)


@SIDES
@pytest.mark.parametrize("dtype", usual([FP32, BF16], FP16), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_project(lane, shape, dtype, left):
    case, basis = case_of(lane, *shape, left, grad=dtype)
    got = project_int4(case.grad, *basis[:3], left=left, group_size=basis.group_size)
    want = reference.project(case.wants["grad"], case.wants["basis"], left=left)
    assert got.dtype == FP32
    lane.assert_close("R", got, want, rtol=1e-6, atol=4e-7 * case.basis.shape[0] ** 0.5)
    case.check_guards()


@SIDES
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_back_project(lane, shape, dtype, left):
    case, basis = case_of(lane, *shape, left, param=dtype)
    back_project_int4_(case.param, case.low_rank, *basis[:3], alpha=-0.5, beta=0.75, left=left, group_size=basis.group_size)
    want = case.wants["param"]
    reference.back_project_(want, case.wants["low_rank"], case.wants["basis"], alpha=-0.5, beta=0.75, left=left)
    lane.assert_close("param", case.param, want, rtol=torch.finfo(dtype).eps, atol=2e-6 * case.r**0.5)
    case.check_guards()


def test_codes_in_words():
    """A code in the lowest bits of 2^k is 2^k + code, whatever the type: what `load_codes` takes off leaves code - 8."""
    codes = torch.arange(16, dtype=torch.int32)
    for dtype, word, power, less in (
        (BF16, torch.int16, basis_kernels.POWER16, basis_kernels.LESS16),
        (FP16, torch.int16, basis_kernels.POWER_FP16, basis_kernels.LESS_FP16),
        (FP32, torch.int32, basis_kernels.POWER32, basis_kernels.LESS32),
    ):
        words = (codes | power.value).to(word).view(dtype)
        assert torch.equal((words - torch.tensor(less.value, dtype=dtype)).float(), codes.float() - 8)


@triton.jit
def back_codes_kernel(
    out, low_rank, packed, scale, offset, m, n, r, width, LEFT: tl.constexpr, NARROW: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(n, BLOCK_N)
    i_m, i_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    b_back = basis_kernels.back_codes(
        low_rank, packed, scale, offset, i_m, i_n, m, n, r, width, LEFT, NARROW, "tf32x3", GROUP, BLOCK_M, BLOCK_N, BLOCK_R
    )
    o_m, o_n = i_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None], i_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(out + o_m * n + o_n, b_back, mask=(o_m < m) & (o_n < n))


@SIDES
@pytest.mark.parametrize("narrow", [BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", [*(shape for shape in SHAPES if shape[2] < 100), (130, 40, 20, 64), (40, 70, 34, 32)], ids=str)
def test_a_tile_of_the_way_back_from_codes(lane, shape, narrow, left):
    """Within the rounding of scale * X to 16 bits"""
    m, n, r, group_size = shape
    case, basis = case_of(lane, *shape, left)
    high, wide = 32, 16

    def back():
        out = torch.empty_like(case.param)
        back_codes_kernel[configs.cdiv(m, high) * configs.cdiv(n, wide),](
            out, case.low_rank, *basis[:3], m, n, r, basis.packed.shape[1], LEFT=left, NARROW=NARROW[narrow], GROUP=group_size,
            BLOCK_M=high, BLOCK_N=wide, BLOCK_R=16,
        )  # fmt: skip
        return out.double().cpu()

    # What a code adds to the entry of code 8 is what is multiplied in 16 bits.
    spread = basis.scale.repeat_interleave(group_size, 1)[:, : case.basis.shape[0]].T.cpu() * 8.0
    want, most = torch.zeros(2, m, n, dtype=torch.float64)
    reference.back_project_(want, case.wants["low_rank"], case.wants["basis"], left=left)
    reference.back_project_(most, case.wants["low_rank"].abs(), spread.double(), left=left)
    assert ((back() - want).abs() <= torch.finfo(narrow).eps / 2 * most + 2e-6 * r**0.5).all()
    left_out = torch.zeros(m, n, dtype=torch.bool)
    (left_out[:, n // 2] if left else left_out[m // 2]).fill_(True)
    (case.low_rank[:, n // 2] if left else case.low_rank[m // 2]).fill_(torch.nan)
    assert torch.equal(back().isnan(), left_out)


@SIDES
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("r", [5, 16])
def test_split_does_not_matter(lane, monkeypatch, r, dtype, left):
    """However a projection is split, R is the same up to the order of fp32 sums; the same split gives the same bits."""
    results, splits = [], set()
    for multiprocessors in (1, 4, 4, 40):
        card = configs.Target(80, multiprocessors)
        monkeypatch.setattr(configs, "target", lambda _, card=card: card)
        m, n = (800, 64) if left else (64, 800)
        case, basis = case_of(lane, m, n, r, 64, left, grad=dtype)
        results.append(project_int4(case.grad, *basis[:3], left=left, group_size=64))
        splits.add(configs.plan_project(m, n, r, left=left, dtypes=(dtype, dtype), card=card).splits)
        want = reference.project(case.wants["grad"], case.wants["basis"], left=left)
        lane.assert_close("R", results[-1], want, rtol=1e-6, atol=4e-7 * 800**0.5)
    assert len(splits) > 1
    assert torch.equal(results[1], results[2])


@SIDES
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_step_of_two_matrices_with_adam_as_the_epilogue(lane, dtype, left):
    """The launchers of a step take an INT4 basis, and several matrices at once."""
    pairs = [case_of(lane, 100, 160, 33, 32, left, dtype, dtype, seed) for seed in (0, 1)]
    cases, bases = zip(*pairs)
    before = [case.param.clone() for case in cases]
    hyper = {key: value for key, value in lane.hyper.items() if key != "eps"}
    scalars, _ = advance([torch.full((), 2.0, device=lane.device) for _ in range(2)], lr=1e-2, **hyper)
    updates = [torch.empty_like(case.exp_avg) for case in cases]
    launch_project(
        [case.grad for case in cases],
        bases,
        updates,
        left=left,
        counters=counters_of(lane.device),
        exp_avgs=[case.exp_avg for case in cases],
        exp_avg_sqs=[case.exp_avg_sq for case in cases],
        scalars=scalars,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
    )
    launch_apply([case.param for case in cases], scalars, left=left, low_ranks=updates, bases=bases)
    for case, first in zip(cases, before):
        case.oracle(step=3)
        case.check(first)


@SIDES
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_squares_of_the_channels(lane, dtype, left):
    """A step that keeps R may ask for the sums of squares of G's channels."""
    case, basis = case_of(lane, 150, 170, 20, 64, left, grad=dtype)
    out, buffers = torch.empty_like(case.exp_avg), []

    def buffer(splits):
        buffers.append(torch.empty(splits, 170 if left else 150, device=lane.device))
        return buffers[-1]

    got = launch_project([case.grad], [basis], [out], left=left, counters=counters_of(lane.device), squares=buffer)
    lane.assert_close("R", out, reference.project(case.wants["grad"], case.wants["basis"], left=left), rtol=1e-6, atol=6e-6)
    want = case.wants["grad"].square().sum(0 if left else 1)
    lane.assert_close("squares", got.sum(0), want, rtol=2e-6, atol=0.0)


@SIDES
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_nan_stays_in_its_channel(lane, dtype, left):
    case, basis = case_of(lane, 63, 65, 5, 32, left, grad=dtype)
    case.grad[3, 7] = float("nan")
    got = project_int4(case.grad, *basis[:3], left=left, group_size=32)
    assert (got[:, 7] if left else got[3]).isnan().all() and got.isnan().sum() == case.r


def assert_bytes(meter, launch, rows):
    for name in launch.counts:
        if name not in ("scalars", "counters"):
            assert meter.bytes(launch, name) == rows.pop(name), name
    assert all(row == (0, 0) for row in rows.values()), rows


@SIDES
@pytest.mark.parametrize("shape", [(63, 100, 5, 32), (300, 80, 16, 256), (40, 144, 130, 64), (700, 700, 5, 256)], ids=str)
def test_traffic(lane, meter, monkeypatch, shape, left):
    """The basis moves as half a byte an entry, and its scales."""
    card = configs.Target(80, 6)
    monkeypatch.setattr(configs, "target", lambda _: card)
    m, n, r, group_size = shape
    case, basis = case_of(lane, *shape, left, param=BF16, grad=BF16)
    project_int4(case.grad, *basis[:3], left=left, group_size=group_size)
    back_project_int4_(case.param, case.low_rank, *basis[:3], left=left, group_size=group_size)
    first, second = meter.launches
    int4 = traffic.Int4(group_size)
    rows = traffic.project(m, n, r, left=left, grad=BF16, basis=int4, card=card)
    d, channels = (m, n) if left else (n, m)
    times = -(-channels // configs.plan_project(m, n, r, left=left, dtypes=(BF16, BF16), card=card).config["BLOCK_C"])
    assert rows["basis"].loaded == times * r * -(-d // 2)
    assert_bytes(meter, first, dict(rows))
    assert (first.counts["grad"]["loaded"] == -(-r // 128)).all()
    assert_bytes(meter, second, traffic.apply(m, n, r, left=left, weight=BF16, low_rank=FP32, basis=int4, card=card))
    assert (second.counts["weight"]["loaded"] == 1).all() and (second.counts["weight"]["stored"] == 1).all()


@SIDES
def test_a_basis_is_an_eighth_of_fp32_by_formula(left):
    card = configs.Target(90, 132)
    kind = {"left": left, "grad": BF16, "card": card}
    packed, plain = (traffic.project(4096, 4096, 128, basis=basis, **kind) for basis in (traffic.Int4(256), FP32))
    assert packed["basis"].loaded * 8 == plain["basis"].loaded
    # A tile of 32 entries reads its scale and offset: no more than the codes.
    assert packed["scale"].loaded + packed["offset"].loaded <= packed["basis"].loaded
    assert packed["grad"] == plain["grad"] and packed["partials"] == plain["partials"]
