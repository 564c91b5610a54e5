"""INT4 bases on the CPU: codes are the oracle's to the bit, products are those of the dequantized basis."""

import pytest
import torch
from resident import measured, peak_of
from test_native_ops import FLOATS

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
