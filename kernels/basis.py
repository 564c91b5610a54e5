"""A basis as the products read it: a matrix, or INT4 that is unpacked in registers.

An entry of INT4 is offset + scale * code, and codes are exact in 16 bits. Beside a 16-bit operand they are multiplied as they are,
scales and offsets come in once a group, in fp32; beside fp32 each entry is made first. Codes are taken less 8, so that they cancel
as the entries do: offset + scale * code = (offset + 8 scale) + scale * (code - 8).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lowrank_sys.kernels.common import INTERPRETED, dot, one_each

# By type: 2^k, k the bits of its mantissa, and 2^k + 8. A code in the lowest bits of 2^k adds itself; less 2^k + 8 it is code - 8.
POWER16, LESS16 = tl.constexpr(0x4300), tl.constexpr(136.0)  # bf16
POWER_FP16, LESS_FP16 = tl.constexpr(0x6400), tl.constexpr(1032.0)
POWER32, LESS32 = tl.constexpr(0x4B000000), tl.constexpr(8388616.0)


class Int4Basis(NamedTuple):
    """A basis (d, r) in INT4, see `quantize_int4`; stands in for a matrix wherever a launcher takes a basis."""

    packed: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor
    group_size: int = 256

    @property
    def dtype(self):
        """What an entry is where each is made first."""
        return torch.float32

    @property
    def rank(self):
        return self.packed.shape[0]


def rank(basis):
    """Number of basis vectors."""
    return basis.rank if isinstance(basis, Int4Basis) else basis.shape[1]


def types(other, basis):
    """The types of the operands of a product with a tensor `other`: the codes of an INT4 basis take the other's."""
    return (other.dtype, other.dtype if isinstance(basis, Int4Basis) else basis.dtype)


def arguments(bases):
    """What a launch passes for its bases, which are all matrices or all INT4 in groups of one size."""
    if not isinstance(bases[0], Int4Basis):
        return {"basis": one_each(bases), "scale": None, "offset": None, "width": 0, "GROUP": 0}
    packed, scales, offsets = (one_each(part) for part in list(zip(*bases))[:3])
    return {"basis": packed, "scale": scales, "offset": offsets, "width": packed[0].shape[1], "GROUP": bases[0].group_size}


@triton.jit
def load_packed(packed, o_r, first, r, width, BLOCK_D: tl.constexpr):
    """The bytes of entries first ... first + BLOCK_D - 1 of the basis vectors o_r, (BLOCK_R, BLOCK_D / 2)."""
    o_byte = (first // 2 + tl.arange(0, BLOCK_D // 2)).to(tl.int64)
    mask = (o_r < r)[:, None] & (o_byte < width)[None, :]
    return tl.load(packed + o_r[:, None] * width + o_byte[None, :], mask=mask, other=0)


@triton.jit
def load_int4(packed, scale, offset, o_r, first, d, r, width, GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Entries first ... first + BLOCK_D - 1 of the basis vectors o_r, (BLOCK_R, BLOCK_D) in fp32: offset + scale * code.

    first is a multiple of BLOCK_D, which divides GROUP or is a multiple of it. What lies outside of the basis is finite.

    Bytes: half a byte an entry, and scale and offset once a group, or a tile where it is smaller than a group.
    """
    PARTS: tl.constexpr = BLOCK_D // GROUP if BLOCK_D > GROUP else 1
    b_packed = load_packed(packed, o_r, first, r, width, BLOCK_D)
    b_code = tl.interleave(b_packed & 15, b_packed >> 4).to(tl.float32)

    groups = tl.cdiv(d, GROUP)
    o_group = (first // GROUP + tl.arange(0, PARTS)).to(tl.int64)
    o_scale, m_scale = o_r[:, None] * groups + o_group[None, :], (o_r < r)[:, None] & (o_group < groups)[None, :]
    b_scale = tl.load(scale + o_scale, mask=m_scale, other=0.0)
    b_offset = tl.load(offset + o_scale, mask=m_scale, other=0.0)
    b_code = tl.reshape(b_code, [BLOCK_R, PARTS, BLOCK_D // PARTS])
    return tl.reshape(b_offset[:, :, None] + b_scale[:, :, None] * b_code, [BLOCK_R, BLOCK_D])


@triton.jit
def load_codes(packed, o_r, first, r, width, NARROW: tl.constexpr, BLOCK_D: tl.constexpr):
    """Codes less 8 of entries first ... first + BLOCK_D - 1 of the vectors o_r, (BLOCK_R, BLOCK_D) in NARROW: exact.

    In the interpreter, which knows no arithmetic of bf16, in fp32. Bytes: half a byte an entry.
    """
    b_packed = load_packed(packed, o_r, first, r, width, BLOCK_D)
    TYPE: tl.constexpr = tl.float32 if INTERPRETED else NARROW
    if TYPE == tl.float32:
        WORD: tl.constexpr = tl.uint32
        POWER: tl.constexpr = POWER32
        LESS: tl.constexpr = LESS32
    else:
        WORD: tl.constexpr = tl.uint16
        POWER: tl.constexpr = POWER16 if TYPE == tl.bfloat16 else POWER_FP16
        LESS: tl.constexpr = LESS16 if TYPE == tl.bfloat16 else LESS_FP16
    b_packed = b_packed.to(WORD)
    b_word = tl.interleave((b_packed & 15) | POWER, (b_packed >> 4) | POWER)
    return b_word.to(TYPE, bitcast=True) - tl.full([], LESS, TYPE)


@triton.jit
def load_group(scale, offset, o_r, i_group, groups, r):
    """(scale, offset of code - 8) of group i_group of the vectors o_r, (BLOCK_R,); zeros from r on."""
    o_scale = o_r * groups + i_group
    b_scale = tl.load(scale + o_scale, mask=o_r < r, other=0.0)
    return b_scale, tl.load(offset + o_scale, mask=o_r < r, other=0.0) + 8 * b_scale


@triton.jit
def project_codes(
    grad,
    packed,
    scale,
    offset,
    squares,
    o_r,
    o_c,
    begin,
    end,
    m,
    n,
    r,
    width,
    LEFT: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(R (BLOCK_R, BLOCK_C), sums of squares (BLOCK_C,) if `squares`) of entries begin ... end - 1, for a 16-bit G and INT4.

    R += scale_g (Codesᵀ G_g) + offset_g (sum of G_g along the projected axis), group by group: the tensor cores multiply codes by
    G, all sums are fp32. begin is a multiple of BLOCK_D.

    Bytes: G, half a byte an entry of the basis, scale and offset once a group.
    """
    DEEP: tl.constexpr = BLOCK_D if BLOCK_D < GROUP else GROUP  # a tile lies in one group
    depth, channels = (m, n) if LEFT else (n, m)
    groups = tl.cdiv(depth, GROUP)
    o_d = (begin + tl.arange(0, DEEP)).to(tl.int64)
    stride = tl.full([], DEEP, tl.int64)
    m_c = o_c < channels
    if LEFT:
        p_g, step = grad + o_d[:, None] * n + o_c[None, :], stride * n
    else:
        p_g, step = grad + o_c[:, None] * n + o_d[None, :], stride

    b_r = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    b_part = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    b_sum = tl.zeros([DEEP if LEFT else BLOCK_C, BLOCK_C if LEFT else DEEP], tl.float32)
    b_square = tl.zeros([DEEP if LEFT else BLOCK_C, BLOCK_C if LEFT else DEEP], tl.float32)
    for i_d in range(begin, end, DEEP):
        m_d = i_d + tl.arange(0, DEEP) < end
        b_g = tl.load(p_g, mask=(m_d[:, None] & m_c[None, :]) if LEFT else (m_c[:, None] & m_d[None, :]), other=0.0)
        b_code = load_codes(packed, o_r, i_d, r, width, grad.dtype.element_ty, DEEP)
        b_part = dot(b_code, b_g if LEFT else tl.trans(b_g), b_part, PRECISION)
        b_wide = b_g.to(tl.float32)
        b_sum += b_wide
        if squares is not None:
            b_square += b_wide * b_wide
        if (i_d + DEEP) % GROUP == 0 or i_d + DEEP >= end:
            b_scale, b_offset = load_group(scale, offset, o_r, i_d // GROUP, groups, r)
            b_r += b_scale[:, None] * b_part + b_offset[:, None] * tl.sum(b_sum, axis=0 if LEFT else 1)[None, :]
            b_part, b_sum = tl.zeros_like(b_part), tl.zeros_like(b_sum)
        p_g += step
    return b_r, tl.sum(b_square, axis=0 if LEFT else 1)


@triton.jit
def narrowed(b_x, NARROW: tl.constexpr):
    """b_x in NARROW, rounded to nearest even. In the interpreter, whose casts to bf16 truncate, the same values in fp32."""
    if not INTERPRETED:
        b_round = b_x.to(NARROW)
    elif NARROW == tl.float16:
        b_round = b_x.to(NARROW).to(tl.float32)
    else:
        bits = b_x.to(tl.uint32, bitcast=True)
        b_round = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        b_round = tl.where(b_x == b_x, b_round, b_x)
    return b_round


@triton.jit
def back_codes(
    low_rank,
    packed,
    scale,
    offset,
    i_m,
    i_n,
    m,
    n,
    r,
    width,
    LEFT: tl.constexpr,
    NARROW: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Tile (i_m, i_n) of B X if LEFT, else of X Bᵀ, in fp32, for INT4; finite, but not always 0, outside of the matrix.

    A tile lies in one group g: Codes (scale_g X) + the sum of offset_g X over the rank, where scale_g X is rounded to NARROW, bf16
    or fp16, in which the codes are exact. The side of the tile along the basis (BLOCK_M if LEFT) divides GROUP.

    Bytes: X, half a byte an entry of the basis, and scale and offset of one group, once a tile.
    """
    tl.static_assert(GROUP % (BLOCK_M if LEFT else BLOCK_N) == 0, "a tile lies in one group")
    o_m = (i_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    m_m, m_n = o_m < m, o_n < n
    first = i_m * BLOCK_M if LEFT else i_n * BLOCK_N
    groups = tl.cdiv(m if LEFT else n, GROUP)

    b_back = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_sum = tl.zeros([BLOCK_N if LEFT else BLOCK_M], tl.float32)
    for i_r in range(0, r, BLOCK_R):
        o_r = (i_r + tl.arange(0, BLOCK_R)).to(tl.int64)
        b_scale, b_offset = load_group(scale, offset, o_r, first // GROUP, groups, r)
        if LEFT:
            b_code = load_codes(packed, o_r, first, r, width, NARROW, BLOCK_M)
            b_x = tl.load(low_rank + o_r[:, None] * n + o_n[None, :], mask=(o_r < r)[:, None] & m_n[None, :], other=0.0)
            b_x = b_x.to(tl.float32)
            b_back = dot(tl.trans(b_code), narrowed(b_scale[:, None] * b_x, NARROW), b_back, PRECISION)
            b_sum += tl.sum(b_offset[:, None] * b_x, axis=0)
        else:
            b_code = load_codes(packed, o_r, first, r, width, NARROW, BLOCK_N)
            b_x = tl.load(low_rank + o_m[:, None] * r + o_r[None, :], mask=m_m[:, None] & (o_r < r)[None, :], other=0.0)
            b_x = b_x.to(tl.float32)
            b_back = dot(narrowed(b_x * b_scale[None, :], NARROW), b_code, b_back, PRECISION)
            b_sum += tl.sum(b_x * b_offset[None, :], axis=1)
    return b_back + (b_sum[None, :] if LEFT else b_sum[:, None])
