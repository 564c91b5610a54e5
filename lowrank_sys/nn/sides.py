"""Which side of a projected layer's weight costs fewer bytes."""

from typing import NamedTuple

# Bytes that R costs an element: two moments and its gradient in fp32.
LOW_RANK_BYTES = 12


class Cost(NamedTuple):
    """Bytes of a basis on one side of a layer."""

    low_rank: int  # R, which is a gradient, and its two moments, fp32
    basis: int
    kept: int  # for backward

    @property
    def total(self):
        return sum(self)


class Sides(NamedTuple):
    """A layer, or a stack of experts, with the basis on the left of its weight (m, n) and on the right."""

    name: str
    shape: tuple[int, int]
    left: Cost
    right: Cost

    def times(self, count):
        """Of so many layers of this shape."""
        return self._replace(left=Cost(*(count * part for part in self.left)), right=Cost(*(count * part for part in self.right)))

    @property
    def cheaper(self):
        """'left' or 'right', of equal bytes what keeps less, then the right."""
        cost = {side: (getattr(self, side).total, getattr(self, side).kept) for side in ("right", "left")}
        return min(cost, key=cost.get)


def sides(name, weight, rank, tokens, transposed):
    """Sides of one layer. transposed: whether its weight is (in, out)."""
    (m, n), size = weight.shape, weight.element_size()
    wide, narrow = size * tokens * (m if transposed else n), size * tokens * rank
    left = Cost(LOW_RANK_BYTES * rank * n, size * rank * m, narrow if transposed else wide)
    right = Cost(LOW_RANK_BYTES * rank * m, size * rank * n, wide if transposed else narrow)
    return Sides(name, (m, n), left, right)


def in_words(compared):
    """The totals of both sides, and of the cheaper one of each layer."""
    left, right = (sum(getattr(one, side).total for one in compared) for side in ("left", "right"))
    best = sum(min(one.left.total, one.right.total) for one in compared)
    on_left = sum(one.cheaper == "left" for one in compared)
    return (
        f"{len(compared)} layers: all left {left / 2**20:.1f} MiB, all right {right / 2**20:.1f} MiB, "
        f"{on_left} left and {len(compared) - on_left} right {best / 2**20:.1f} MiB"
    )
