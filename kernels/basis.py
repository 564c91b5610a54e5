"""A basis as the products read it: a matrix, or INT4 that is unpacked in registers."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Int4Basis(NamedTuple):
    """A basis (d, r) in INT4, see `quantize_int4`; stands in for a matrix in fp32 wherever a launcher takes a basis."""

    packed: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor
    group_size: int = 256

    @property
    def dtype(self):
        """What an entry is in the products."""
        return torch.float32

    @property
    def rank(self):
        return self.packed.shape[0]


def rank(basis):
    """Number of basis vectors."""
    return basis.rank if isinstance(basis, Int4Basis) else basis.shape[1]


def arguments(bases):
    """What a launch passes for its bases, which are all matrices or all INT4 in groups of one size."""
    if not isinstance(bases[0], Int4Basis):
        return {"basis": tuple(bases), "scale": None, "offset": None, "width": 0, "GROUP": 0}
    packed, scales, offsets, sizes = zip(*bases)
    return {"basis": packed, "scale": scales, "offset": offsets, "width": packed[0].shape[1], "GROUP": sizes[0]}


@triton.jit
def load_int4(packed, scale, offset, o_r, first, d, r, width, GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Entries first ... first + BLOCK_D - 1 of the basis vectors o_r, (BLOCK_R, BLOCK_D) in fp32: offset + scale * code.

    first is a multiple of BLOCK_D, which divides GROUP or is a multiple of it. What lies outside of the basis is finite.

    Bytes: half a byte an entry, and scale and offset once a group, or a tile where it is smaller than a group.
    """
    PARTS: tl.constexpr = BLOCK_D // GROUP if BLOCK_D > GROUP else 1
    o_byte = (first // 2 + tl.arange(0, BLOCK_D // 2)).to(tl.int64)
    m_r = (o_r < r)[:, None]
    b_packed = tl.load(packed + o_r[:, None] * width + o_byte[None, :], mask=m_r & (o_byte < width)[None, :], other=0)
    b_code = tl.interleave(b_packed & 15, b_packed >> 4).to(tl.float32)

    groups = tl.cdiv(d, GROUP)
    o_group = (first // GROUP + tl.arange(0, PARTS)).to(tl.int64)
    o_scale, m_scale = o_r[:, None] * groups + o_group[None, :], m_r & (o_group < groups)[None, :]
    b_scale = tl.load(scale + o_scale, mask=m_scale, other=0.0)
    b_offset = tl.load(offset + o_scale, mask=m_scale, other=0.0)
    b_code = tl.reshape(b_code, [BLOCK_R, PARTS, BLOCK_D // PARTS])
    return tl.reshape(b_offset[:, :, None] + b_scale[:, :, None] * b_code, [BLOCK_R, BLOCK_D])
