"""INT4 bases on the CPU: codes are the oracle's to the bit, products are those of the dequantized basis."""

import pytest
import torch
from resident import measured, peak_of
from test_native_ops import FLOATS, assert_refused

import lowrank_sys  # noqa: F401  registers the ops
from lowrank_sys import backends, reference

ops = torch.ops.lowrank
FP32_MAX = torch.finfo(torch.float32).max
GROUPS = (32, 64, 128, 256, 512, 1024)
SHAPES = [(1, 1), (2, 1), (33, 3), (64, 32), (255, 7), (256, 33), (257, 64), (515, 130), (1030, 5)]
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])

pytestmark = pytest.mark.skipif(bool(backends.NATIVE_MISSING), reason=f"no native build: {backends.NATIVE_MISSING}")


def bits(x):
    """For comparing floats to the bit; every NaN is one."""
    return x.nan_to_num(nan=12345.0).view(torch.int32) if x.is_floating_point() else x


def assert_codes(basis, group_size):
    """The op's packed, scale and offset, which are the oracle's."""
    got = ops.quantize_int4(basis, group_size=group_size)
    want = reference.quantize_int4(basis, group_size=group_size)
    for name, a, b in zip(("packed", "scale", "offset"), got, want):
        assert a.dtype == b.dtype and torch.equal(bits(a), bits(b)), name
        assert a.is_contiguous(), name
    values = ops.dequantize_int4(*got, d=basis.shape[0], group_size=group_size)
    assert torch.equal(bits(values), bits(reference.dequantize_int4(*got, d=basis.shape[0], group_size=group_size)))
    return got, values


def spread(per_group, d, group_size):
    """A number a group (r, groups) as a number an entry (d, r)."""
    return per_group.repeat_interleave(group_size, dim=1)[:, :d].T


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_the_oracles(shape, dtype, group_size):
    basis = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    (packed, scale, offset), values = assert_codes(basis, group_size)
    d, r = shape
    assert packed.shape == (r, (d + 1) // 2) and scale.shape == offset.shape == (r, -(-d // group_size))
    assert d % 2 == 0 or (packed[:, -1] >> 4 == 0).all()
    error = (values.double() - basis.double()).abs()
    # Half a step, and the roundings of the value itself.
    size = offset.abs() + 15 * scale
    assert (error <= spread(0.5 * scale.double() + 2.0**-22 * size.double(), d, group_size)).all()


def test_a_basis_is_half_a_byte_an_entry():
    """Q-GaLore's own code keeps a byte for each."""
    packed, scale, offset = ops.quantize_int4(torch.randn(4096, 128))
    assert packed.nbytes == 4096 * 128 // 2
    assert scale.nbytes + offset.nbytes == 8 * 4096 * 128 // 256


def test_the_layout():
    basis = torch.arange(16.0)[:, None].repeat(2, 1)
    packed, scale, offset = ops.quantize_int4(basis, group_size=32)
    assert packed.tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2]
    assert scale.item() == 1 and offset.item() == 0
    # Ties go to the even code.
    packed, _, _ = ops.quantize_int4(torch.tensor([0.0, 0.5, 1.5, 2.5, 14.5, 15.0])[:, None], group_size=32)
    assert packed.tolist() == [[0x00, 0x22, 0xFE]]


@pytest.mark.parametrize("low, high", [(0.010, 0.013), (-0.013, -0.010), (100.0, 101.0), (-1e-20, -0.9e-20)])
def test_a_group_of_one_sign_is_good_to_half_a_step(low, high):
    """A zero point that is clamped to 4 bits, as in Q-GaLore's code, moves the whole group."""
    basis = torch.linspace(low, high, 300)[:, None].contiguous()
    (_, scale, offset), values = assert_codes(basis, 256)
    assert ((values - basis).abs() <= spread(0.5 * scale + 2.0**-22 * offset.abs(), 300, 256)).all()
    assert values.min() == basis.min() and torch.equal(values.sign(), basis.sign())


def test_numel_that_is_no_multiple_of_the_group():
    basis = torch.cat((torch.randn(256, 3), 1e-3 * torch.randn(45, 3)))
    (packed, scale, _), values = assert_codes(basis, 256)
    assert packed.shape == (3, 151) and scale.shape == (3, 2)
    assert ((values - basis)[256:].abs() <= 1e-3).all()


@pytest.mark.parametrize("value", [0.0, -0.0, 0.1, -3.7, 1e-42, -1e-42, 1e-37, FP32_MAX, -FP32_MAX])
def test_a_constant_group_is_exact(value):
    (_, scale, _), values = assert_codes(torch.full((70, 2), value), 32)
    assert (scale == 0).all() and (values == value).all()


def test_a_denormal_range_is_the_minimum():
    (packed, scale, _), values = assert_codes(torch.tensor([1e-42, 3e-42, 0.0, 2e-40])[:, None], 32)
    assert not packed.any() and not scale.any() and not values.any()


@pytest.mark.parametrize(
    "bad", [[torch.nan], [torch.inf], [-torch.inf], [torch.inf, -torch.inf], [FP32_MAX, -FP32_MAX], [torch.nan, torch.inf]]
)
def test_a_group_that_cannot_be_kept_is_nan(bad):
    """NaN, infinity, or a range beyond fp32: the group is NaN throughout, its neighbours are not touched."""
    basis = torch.randn(96, 40)
    basis[[40, 35][: len(bad)], 33] = torch.tensor(bad)
    clean = basis.clone()
    clean[32:64, 33] = 0
    (packed, scale, offset), values = assert_codes(basis, 32)
    assert scale[33, 1].isnan() and offset[33, 1].isnan() and not packed[33, 16:32].any()
    assert values[32:64, 33].isnan().all() and values.isnan().sum() == 32
    others = [x.nan_to_num(0) for x in (scale, offset)]
    want = ops.quantize_int4(clean, group_size=32)
    assert torch.equal(packed, want[0]) and all(map(torch.equal, others, want[1:]))


@SIDES
def test_a_group_that_is_nan_reaches_the_product(left):
    """A basis that could not be kept makes its row of R NaN, which a step leaves out."""
    basis = torch.randn(64, 5)
    basis[3, 2] = torch.inf
    r = ops.project_int4(torch.randn(64, 64), *ops.quantize_int4(basis, group_size=32), left=left, group_size=32)
    bad = r[2] if left else r[:, 2]
    assert bad.isnan().all() and r.isnan().sum() == 64


@measured
@SIDES
def test_the_basis_is_never_materialised(left):
    """64 MiB in fp32; the products hold a panel of 256 KiB a thread, and what the GEMM keeps."""
    d, r = 16384, 1024
    int4 = [x.repeat(r, 1) for x in ops.quantize_int4(torch.randn(d, 1))]
    x, grad = torch.randn((r, 32) if left else (32, r)), torch.randn((d, 32) if left else (32, d))
    for op in (lambda: ops.project_int4(grad, *int4, left=left), lambda: ops.back_project_int4_(grad, x, *int4, left=left)):
        op()
        assert peak_of(op) < 8 << 20


def arguments(left=True):
    """20 x 30, r = 4."""
    packed, scale, offset = ops.quantize_int4(torch.randn(20 if left else 30, 4), group_size=32)
    return {
        "param": torch.randn(20, 30),
        "low_rank": torch.randn((4, 30) if left else (20, 4)),
        "packed": packed,
        "scale": scale,
        "offset": offset,
    }


PROJECT, BACK = "project_int4", "back_project_int4_"
BAD = {
    "param 1-dim": (BACK, {"param": torch.zeros(3)}, "param must be a matrix (m, n), got shape (3,)"),
    "param fp64": (BACK, {"param": torch.zeros(20, 30).double()}, "param must be float32, bfloat16 or float16, got torch.float64"),
    "param strided": (BACK, {"param": torch.zeros(30, 20).T}, "param must be contiguous, got strides (1, 20)"),
    "low_rank shape": (BACK, {"low_rank": torch.zeros(4, 29)}, "low_rank must have shape (4, 30), got (4, 29)"),
    "low_rank bf16": (BACK, {"low_rank": torch.zeros(4, 30).bfloat16()}, "low_rank must be torch.float32, got torch.bfloat16"),
    "grad int": (PROJECT, {"param": torch.zeros(20, 30).int()}, "grad must be float32, bfloat16 or float16, got torch.int32"),
    "grad of the other side": (
        PROJECT,
        {"param": torch.zeros(30, 20)},
        "packed must have shape (r, 15) for vectors of 30 entries, got (4, 10)",
    ),
    "packed shape": (
        PROJECT,
        {"packed": torch.zeros(4, 9).byte()},
        "packed must have shape (r, 10) for vectors of 20 entries, got (4, 9)",
    ),
    "packed 1-dim": (PROJECT, {"packed": torch.zeros(40).byte()}, "packed must have shape (r, 10)"),
    "packed of rank 0": (PROJECT, {"packed": torch.zeros(0, 10).byte()}, "rank must be at least 1, got packed of shape (0, 10)"),
    "packed int8": (PROJECT, {"packed": torch.zeros(4, 10).char()}, "packed must be torch.uint8, got torch.int8"),
    "packed strided": (BACK, {"packed": torch.zeros(10, 4).byte().T}, "packed must be contiguous, got strides (1, 4)"),
    "scale shape": (PROJECT, {"scale": torch.zeros(4, 2)}, "scale must have shape (4, 1), got (4, 2)"),
    "scale fp16": (BACK, {"scale": torch.zeros(4, 1).half()}, "scale must be torch.float32, got torch.float16"),
    "offset shape": (BACK, {"offset": torch.zeros(3, 1)}, "offset must have shape (4, 1), got (3, 1)"),
    "offset int": (PROJECT, {"offset": torch.zeros(4, 1).int()}, "offset must be torch.float32, got torch.int32"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_products(name):
    op, change, expected = BAD[name]
    a = arguments() | change
    if op == PROJECT:
        del a["low_rank"]
    assert_refused(getattr(ops, op), list(a.values()), {"left": True, "group_size": 32}, f"{op}: {expected}")


@pytest.mark.parametrize("group_size", [0, -256, 16, 33, 48, 2048])
def test_bad_group_sizes(group_size):
    expected = f"group_size must be a power of two from 32 to 1024, got {group_size}"
    param, low_rank, *int4 = arguments().values()
    extra = {"group_size": group_size}
    assert_refused(ops.quantize_int4, [param], extra, expected)
    assert_refused(ops.dequantize_int4, int4, extra | {"d": 20}, expected)
    assert_refused(ops.project_int4, [param, *int4], extra | {"left": True}, expected)
    assert_refused(ops.back_project_int4_, [param, low_rank, *int4], extra | {"left": True}, expected)


@pytest.mark.parametrize(
    "basis, expected",
    [
        (torch.zeros(3), "quantize_int4: basis must be a matrix (m, n), got shape (3,)"),
        (torch.zeros(3, 0), "quantize_int4: rank must be at least 1, got basis of shape (3, 0)"),
        (torch.zeros(3, 4).double(), "quantize_int4: basis must be float32, bfloat16 or float16, got torch.float64"),
        (torch.zeros(3, 4).T, "quantize_int4: basis must be contiguous, got strides (1, 4)"),
    ],
)
def test_bad_bases(basis, expected):
    assert_refused(ops.quantize_int4, [basis], {}, expected)


@pytest.mark.parametrize(
    "d, expected",
    [(-1, "d must be at least 0, got -1"), (22, "packed must have shape (r, 11) for vectors of 22 entries, got (4, 10)")],
)
def test_bad_lengths(d, expected):
    int4 = list(arguments().values())[2:]
    assert_refused(ops.dequantize_int4, int4, {"d": d, "group_size": 32}, f"dequantize_int4: {expected}")
