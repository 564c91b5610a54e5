"""Random bits in a kernel: Philox 4x32-10 (Salmon et al. 2011), the same bits as csrc/core/philox.h and the oracle."""

import triton
import triton.language as tl


@triton.jit
def random16(seed, step, parameter, o_element):
    """16 random bits (uint32 below 2¹⁶) of each element; o_element (int64) counts elements of the unsharded tensor.

    key = seed, counter = (element / 8 as two words, step, parameter): element 8 g + i takes the half i % 2 of word i / 2.
    """
    o_group = o_element >> 3
    c0, c1 = o_group.to(tl.uint32), (o_group >> 32).to(tl.uint32)
    zero = tl.zeros_like(c0)
    b_0, b_1, b_2, b_3 = tl.philox(seed, c0, c1, zero + step.to(tl.uint32), zero + parameter.to(tl.uint32))
    i_word = (o_element >> 1) & 3
    b_bits = tl.where(i_word < 2, tl.where(i_word == 0, b_0, b_1), tl.where(i_word == 2, b_2, b_3))
    return (b_bits >> ((o_element & 1) * 16).to(tl.uint32)) & 0xFFFF


@triton.jit
def random16_rows(seed, step, parameter, o_first, COUNT: tl.constexpr):
    """`random16` of the COUNT elements from each of o_first (int64, multiples of 8) on: (rows, COUNT), one draw for eight."""
    o_group = (o_first >> 3)[:, None] + tl.arange(0, COUNT // 8)[None, :]
    c0, c1 = o_group.to(tl.uint32), (o_group >> 32).to(tl.uint32)
    zero = tl.zeros_like(c0)
    b_0, b_1, b_2, b_3 = tl.philox(seed, c0, c1, zero + step.to(tl.uint32), zero + parameter.to(tl.uint32))
    b_words = tl.interleave(tl.interleave(b_0, b_2), tl.interleave(b_1, b_3))
    return tl.interleave(b_words & 0xFFFF, b_words >> 16)
