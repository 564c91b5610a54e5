"""INT8 weights written by kernels: the oracle's bits where products are exact, neighbouring codes behind a step's products."""

import pytest
import torch

from lowrank_sys import reference
from lowrank_sys._ops.named_steps import bound
from lowrank_sys.kernels import configs, traffic
from lowrank_sys.kernels.back_project import back_project_int8_
from lowrank_sys.kernels.int8 import aligned
from lowrank_sys.kernels.step import step as kernel_step

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
HYPER = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
# m, n, r and the groups of the weight and of the basis: one element, short groups, several tiles of either axis, aligned rows.
SHAPES = [(1, 1, 1, 32, 32), (70, 300, 9, 64, 32), (33, 512, 16, 256, 256), (5, 1031, 3, 1024, 64), (130, 64, 32, 32, 32)]


def same(got, want):
    return all(torch.equal(a.cpu().nan_to_num(7), b.cpu().nan_to_num(7)) for a, b in zip(got, want, strict=True))


def exact_product(m, n, r, basis_group_size, left, kind):
    """X and a basis whose product is exact in fp32, whatever the order of the sums."""
    draw = torch.Generator().manual_seed(m + n)
    d = m if left else n
    x = torch.randint(-4, 5, (r, n) if left else (m, r), generator=draw).float()
    if kind != "int4":
        return x, (torch.randint(-4, 5, (d, r), generator=draw).to(kind), None, None)
    packed = torch.randint(0, 256, (r, (d + 1) // 2), generator=draw, dtype=torch.uint8)
    if d % 2:
        packed[:, -1] &= 15
    groups = -(-d // basis_group_size)
    return x, (packed, torch.full((r, groups), 0.5), torch.randint(-4, 5, (r, groups), generator=draw).float())


def on(device, tensors):
    return [t if t is None else t.to(device) for t in tensors]


@SIDES
@pytest.mark.parametrize("kind", ["int4", FP32, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_are_the_oracles(lane, shape, kind, left):
    """Over updates that keep all scales, replace some, and replace all; with a channel that is left out."""
    m, n, r, group_size, basis_group_size = shape
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    weight[: m // 4] = 0.0
    x, basis = exact_product(m, n, r, basis_group_size, left, kind)
    (x[:, n // 2] if left else x[m // 2]).fill_(torch.nan if m > 1 else 2.0)
    want = reference.quantize_int8(weight, group_size=group_size)
    got = [t.clone().to(lane.device) for t in want]
    for step, alpha, offset in ((0, 2.0**-14, 0), (1, -(2.0**-6), 3), (2, 3.0, 2**40)):
        call = dict(
            alpha=alpha,
            decay=0.9,
            left=left,
            seed=-7,
            step=step,
            parameter=2**32 - 1,
            offset=offset,
            group_size=group_size,
            basis_group_size=basis_group_size,
        )
        reference.back_project_int8_(*want, x, *basis, **call)
        back_project_int8_(*got, *on(lane.device, (x, *basis)), **call)
        assert same(got, want)


def test_rows_share_draws_only_where_they_begin_on_eight():
    assert aligned(64, 8) and not aligned(60, 8) and not aligned(64, 4)


def test_hostile_scales_and_updates_are_the_oracles(lane):
    """Scales of any kind; updates that are huge, denormal or not finite."""
    codes = torch.randint(-127, 128, (9, 256), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    scale = torch.ones(9, 8)
    scale[:, 0] = torch.tensor([torch.nan, torch.inf, 0.0, 1e-40, -1.0, 1e38, 1e-38, 3e38, 2.0**-126])
    x = torch.tensor([1.0, 1e38, -1e38, 3e38, 1e-42, torch.inf, torch.nan, 0.0, 1e10])[:, None]
    basis = torch.tensor([1.0, -2.0, 0.0, 1e-30]).repeat(64)[:, None].contiguous()
    for alpha in (1.0, -1e-3, 1e10):
        want, got = [codes.clone(), scale.clone()], on(lane.device, [codes.clone(), scale.clone()])
        call = dict(alpha=alpha, decay=-2.0, left=False, seed=1, step=2, parameter=3, group_size=32)
        reference.back_project_int8_(*want, x, basis, **call)
        back_project_int8_(*got, *on(lane.device, (x, basis)), **call)
        assert same(got, want)


class Matrix:
    """Arguments of a step on one matrix, on the CPU for the oracle and on the device for the kernels."""

    def __init__(self, lane, op, m, n, r, left, int4=True, group_size=64, seed=0, grad=FP32, limited=False):
        draw = torch.Generator().manual_seed(seed)
        d, shape = m if left else n, (r, n) if left else (m, r)
        randn = lambda *size: torch.randn(size, generator=draw)  # noqa: E731
        args = dict(zip(("codes", "weight_scale"), reference.quantize_int8(0.1 * randn(m, n), group_size=group_size)))
        args["gradient"] = randn(*shape) if op == "qgalore_subspace_step" else randn(m, n).to(grad)
        basis = torch.linalg.qr(randn(d, r)).Q.contiguous()
        first, second = 0.1 * randn(*shape), 0.1 * randn(*shape).abs() + 0.01
        if op == "apollo_int8_step":
            args |= dict(basis=basis, exp_avg=first, exp_avg_sq=second, limiter=torch.tensor(0.5) if limited else None)
            self.settings = dict(group_size=group_size, scale=1.0, left=left, **HYPER)
        else:
            parts = reference.quantize_int4(basis, group_size=32) if int4 else (basis, None, None)
            args |= dict(zip(("basis", "basis_scale", "basis_offset"), parts))
            moments = [reference.quantize_blockwise(x, signed=s, by_row=True) for x, s in ((first, True), (second, False))]
            args |= dict(
                exp_avg=moments[0][0], exp_avg_sq=moments[1][0], exp_avg_absmax=moments[0][1], exp_avg_sq_absmax=moments[1][1]
            )
            self.settings = dict(group_size=group_size, basis_group_size=32, scale=0.25, left=left, **HYPER)
        self.op, self.want = op, args
        self.got = {name: t if t is None else t.clone().to(lane.device) for name, t in args.items()}

    def check(self):
        """Neighbouring codes, and few of them: a number of up to 127 steps is off by some 127 * 2^-20 of one."""
        same_scale = (self.got["weight_scale"].cpu() - self.want["weight_scale"]).abs() <= 1e-4 * self.want["weight_scale"].abs()
        assert same_scale.double().mean() > 0.97
        wide = same_scale.repeat_interleave(self.settings["group_size"], 1)[:, : self.want["codes"].shape[1]]
        difference = (self.got["codes"].cpu().int() - self.want["codes"].int()).abs()[wide]
        assert difference.max() <= 1 and (difference > 0).sum() <= 2 + difference.numel() // 200


@SIDES
@pytest.mark.parametrize(
    "op, int4, grad",
    [
        ("qgalore_step", True, BF16),
        ("qgalore_step", False, FP32),
        ("qgalore_step", True, FP32),
        ("qgalore_subspace_step", True, FP32),
        ("apollo_int8_step", False, BF16),
        ("apollo_int8_step", False, FP32),
    ],
    ids=str,
)
def test_steps(lane, op, int4, grad, left):
    matrix = Matrix(lane, op, 70, 200, 6, left, int4, grad=grad, limited=True)
    before = matrix.want["codes"].clone()
    call = dict(step=3, lr=0.1, seed=2**40, parameter=1, offset=8, **matrix.settings)
    reference.named(op)(*matrix.want.values(), **call)
    bound(op, kernel_step)(*matrix.got.values(), **call)
    matrix.check()
    assert (matrix.want["codes"] != before).double().mean() > 0.3
    again = Matrix(lane, op, 70, 200, 6, left, int4, grad=grad, limited=True)
    numbers = {"step": torch.tensor(3.0, device=lane.device), "lr": torch.tensor(0.1, dtype=torch.float64, device=lane.device)}
    bound(op, kernel_step)(*again.got.values(), **call | numbers)
    assert same([t for t in again.got.values() if t is not None], [t for t in matrix.got.values() if t is not None])


def assert_bytes(meter, launch, rows):
    for name in launch.counts:
        if name not in ("scalars", "step", "skipped"):
            assert meter.bytes(launch, name) == rows.pop(name), name
    assert all(row == (0, 0) for row in rows.values()), rows


@SIDES
@pytest.mark.parametrize("kind", ["int4", FP32, BF16], ids=str)
@pytest.mark.parametrize("shape", [(70, 300, 9, 64, 32), (72, 512, 48, 256, 256), (20, 2064, 16, 1024, 64)], ids=str)
def test_traffic(lane, meter, shape, kind, left):
    """The weight is its codes and scales, once each way."""
    m, n, r, group_size, basis_group_size = shape
    x, basis = exact_product(m, n, r, basis_group_size, left, kind)
    got = on(lane.device, reference.quantize_int8(torch.randn(m, n), group_size=group_size))
    back_project_int8_(
        *got,
        *on(lane.device, (x, *basis)),
        left=left,
        seed=1,
        step=0,
        parameter=0,
        group_size=group_size,
        basis_group_size=basis_group_size,
    )
    (launch,) = meter.launches
    types = {"weight": traffic.Int8(group_size), "basis": traffic.Int4(basis_group_size) if kind == "int4" else kind}
    card = configs.Target(80, 6)
    assert_bytes(meter, launch, traffic.apply(m, n, r, left=left, low_rank=FP32, card=card, **types))
    assert (launch.counts["weight"]["loaded"] == 1).all() and (launch.counts["weight"]["stored"] == 1).all()


def test_a_weight_moves_in_a_third_of_what_bf16_and_its_copy_would():
    """By formula, a 4096 x 4096 matrix at rank 128 with an INT4 basis."""
    card = configs.Target(90, 132)
    codes, dense = (
        traffic.apply(4096, 4096, 128, left=True, weight=weight, low_rank=FP32, basis=traffic.Int4(), card=card)
        for weight in (traffic.Int8(), BF16)
    )
    assert sum(codes["weight"]) + sum(codes["weight_scale"]) < 0.52 * sum(dense["weight"])
