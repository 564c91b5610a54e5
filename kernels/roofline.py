"""The least time a product can take on a card, computed from published figures: what plans are compared by, never measured."""

from typing import NamedTuple

# Bytes a clock that a multiprocessor gets of the L2 cache: A100's gives 5120 (its white paper), taken for H100's 132 as well.
L2_BYTES = 5120 / 132
# The share of a card that keeps its memory busy, as assumed here.
ENOUGH = 0.75
# A launch that waits for the one before drains and fills the card once more: about this long, as assumed here.
BOUNDARY = 2e-6


class Figures(NamedTuple):
    """Of a card of an architecture."""

    multiprocessors: int
    clock: float  # GHz, boost
    bandwidth: float  # GB/s
    narrow: float  # dense TFLOP/s in bf16 and fp16 with fp32 sums
    tf32: float  # dense TFLOP/s
    cache: int  # MiB of L2


FIGURES = {
    80: Figures(108, 1.41, 2039, 312, 156, 40),  # A100 80GB
    86: Figures(82, 1.695, 936, 71, 35.6, 6),  # RTX 3090
    89: Figures(128, 2.52, 1008, 165.2, 82.6, 72),  # RTX 4090
    90: Figures(132, 1.83, 3350, 989.4, 494.7, 50),  # H100 SXM
    100: Figures(148, 1.85, 8000, 2250, 1125, 126),  # B200
    120: Figures(170, 2.407, 1792, 209.5, 104.8, 96),  # RTX 5090
}


class Work(NamedTuple):
    """What a launch does."""

    flop: float
    cached: float  # bytes between multiprocessors and the L2 cache
    moved: float  # bytes between it and memory
    programs: int


def seconds(card, work, *, narrow):
    """Of one launch: products, cache and memory overlap, and a last wave that is not full wastes what it leaves idle.

    card: a `configs.Target`, whose multiprocessors are those of its architecture's `FIGURES`. narrow: 16-bit operands, else each
    product is three of tf32.
    """
    figures = FIGURES[max((known for known in FIGURES if known <= card.arch), default=min(FIGURES))]
    share = card.multiprocessors / figures.multiprocessors
    waves = -(-work.programs // card.multiprocessors)
    busy = work.programs / (waves * card.multiprocessors)
    products = 1e12 * share * busy * (figures.narrow if narrow else figures.tf32 / 3)
    cache = 1e9 * figures.clock * L2_BYTES * card.multiprocessors * busy
    bandwidth = 1e9 * figures.bandwidth * share * min(1.0, busy / ENOUGH)
    return max(work.flop / products, work.cached / cache, work.moved / bandwidth)


def memory(card, moved):
    """Seconds of a launch that does nothing but move bytes."""
    return seconds(card, Work(0, 0, moved, card.multiprocessors), narrow=True)
