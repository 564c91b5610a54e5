"""Where arguments come from: choices, made by hypothesis, by a seed or by name."""

import math
import random

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Around vectors, tiles of 32 columns and 256 virtual lanes; small ones first, because hypothesis shrinks towards the front.
SIZES = (1, 2, 3, 0, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 129, 255, 256, 257, 300)
HOSTILE = (
    0.0,
    -0.0,
    1e-45,
    -1e-40,
    1e-30,
    -1e-20,
    1e10,
    -1.8e19,
    1e20,
    -1e30,
    1e38,
    3.4e38,
    -3.4e38,
    math.inf,
    -math.inf,
    math.nan,
)
SCALES = (1.0, 0.0, 1e-42, 1e-30, 1e-10, 1e6, 1e15, 1e38)


class Draw:
    """Choices, and tensors that follow from them. A source of choices has `integer`."""

    def integer(self, low, high):
        """A whole number from `low` to `high`."""
        raise NotImplementedError

    def of(self, *values):
        """One of `values`; simpler ones belong first."""
        return values[self.integer(0, len(values) - 1)]

    def count(self):
        """How many matrices a list has."""
        return self.of(1, 2, 0)

    def size(self, least=0, most=300):
        return self.of(*(size for size in SIZES if least <= size <= most))

    def values(self, *shape, dtype=torch.float32, hostile=True):
        """A tensor of `shape`: normal values; if hostile, times a scale, and with a few values of HOSTILE anywhere."""
        generator = torch.Generator().manual_seed(self.integer(0, 999))
        tensor = torch.randn(shape, generator=generator)
        if hostile:
            tensor = tensor * self.of(*SCALES)
            for value in [self.of(*HOSTILE) for _ in range(self.integer(0, 3))]:
                if tensor.numel():
                    tensor.view(-1)[int(torch.randint(tensor.numel(), (), generator=generator))] = value
        return tensor.to(dtype)


class Seeded(Draw):
    """Choices of a seed; sizes out of `sizes` where the op allows one of them, hostile values only if asked for."""

    def __init__(self, seed, sizes=SIZES, hostile=False):
        self._random, self._sizes, self._hostile = random.Random(seed), sizes, hostile

    def integer(self, low, high):
        return self._random.randint(low, high)

    def size(self, least=0, most=300):
        """`most` bounds what a search tries; named sizes may be larger where an op is as quick (m and n, not a rank)."""
        allowed = [size for size in self._sizes if least <= size <= (most if most < 300 else math.inf)]
        return self.of(*allowed) if allowed else super().size(least, most)

    def values(self, *shape, dtype=torch.float32, hostile=True):
        return super().values(*shape, dtype=dtype, hostile=hostile and self._hostile)


class Simplest(Draw):
    """The first choice each time, 16 where it is a size, and no hostile value."""

    def integer(self, low, high):
        return low

    def size(self, least=0, most=300):
        return min(max(least, 16), most)

    def values(self, *shape, dtype=torch.float32, hostile=True):
        return super().values(*shape, dtype=dtype, hostile=False)


class Distinct(Simplest):
    """The first choice each time, two matrices where it is a list, and sizes that tell m = 20, n = 300 and r = 4 apart."""

    def __init__(self):
        self._sizes = iter((20, 300, 4))

    def count(self):
        return 2

    def size(self, least=0, most=300):
        return min(max(least, next(self._sizes, 16)), most)


# Sizes that every op is tried on by name, beside the random ones: (sizes, whether values are hostile).
NAMED = {
    "odd": ((1, 7, 33, 63, 129), False),
    "tiles": ((16, 32, 64, 256), False),
    "empty": ((0, 1, 20), False),
    "hostile": (SIZES, True),
    "large": ((700, 1030, 1100), False),
}


def named(op, name, seed=0):
    """A draw of the sizes of this name; each op has choices of its own."""
    return Seeded(f"{op} {name} {seed}", *NAMED[name])
