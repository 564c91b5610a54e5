"""Philox 4x32-10 (Salmon et al. 2011): random bits as a function of (seed, element, step, parameter), with no state."""

import torch

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


def _product(a, b):
    """High and low word of a 32 x 32 bit product; b is an int64 tensor of words."""
    # In halves: an int64 would overflow.
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    total = low + ((high & 0xFFFF) << 16)
    return (high >> 16) + (total >> 32), total & WORD


def philox(counter, seed):
    """Four words (int64 tensors below 2³²) from a counter of four words and a 64-bit seed (an int)."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & WORD, seed >> 32 & WORD
    for _ in range(10):
        (a_high, a_low), (b_high, b_low) = _product(MULTIPLIERS[0], c0), _product(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = b_high ^ c1 ^ k0, b_low, a_high ^ c3 ^ k1, a_low
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def random16(first, count, *, seed, step, parameter, device="cpu"):
    """16 random bits (int64 below 2¹⁶) of each of the elements first ... first + count - 1 of an unsharded tensor.

    key = seed, counter = (element / 8 as two words, step, parameter): element 8 g + i takes the half i % 2 of word i / 2.
    """
    element = torch.arange(first, first + count, dtype=torch.int64, device=device)
    group = element >> 3
    step, parameter = torch.full_like(group, step & WORD), torch.full_like(group, parameter & WORD)
    words = torch.stack(philox((group & WORD, group >> 32 & WORD, step, parameter), seed))
    word = words.gather(0, (element >> 1 & 3).unsqueeze(0)).squeeze(0)
    return word >> (element & 1) * 16 & 0xFFFF
