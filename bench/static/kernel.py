"""A Triton kernel as the compile lane knows it, and one build of it."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

from lowrank_sys.kernels import configs

FLOATS = ("fp32", "bf16", "fp16")
EVERY_SIZE = ("aligned", "odd", "ones")
# Scalar arguments by name, in any kernel.
SIZES = dict.fromkeys(("m", "n", "r", "width", "splits", "chunk", "channels", "depth", "groups"), "i32")
HYPER = dict.fromkeys(("beta1", "beta2", "gain1", "gain2", "eps"), "fp32")


def no_calls(kind, rank):
    return []


class Kernel(NamedTuple):
    """A kernel and everything that its launchers make of it.

    A call is (types, variant): Triton's names of the types of some arguments, and words that say which arguments are there.
    """

    function: Callable  # the @triton.jit function
    rows: Callable  # arch -> {(kind, largest rank, or what `limit` says): launch configuration}
    calls: Callable  # kind -> calls
    tensors: Callable  # (types, variant) -> {argument: Triton type}, what is not listed is None
    always: Callable = no_calls  # (kind, rank) -> calls that are built on every architecture and side
    each: tuple = ()  # arguments of which a launch with "step" takes one a matrix
    product: bool = True  # must use the tensor cores,
    own: bool = True  # in its required builds of aligned sizes the architecture's own, and 16-byte stores
    constants: Callable = lambda variant, config: {}  # further constants
    limit: str = "r"  # what a configuration is chosen by
    sizes: dict = {}  # kind -> kinds of sizes, where they are not the usual ones


class Row(NamedTuple):
    """One configuration of a kernel's table."""

    kernel: str
    kind: object
    rank: int

    def __str__(self):
        return f"{self.kernel}-{self.kind}-r{self.rank}"


class Case(NamedTuple):
    """One build."""

    arch: int
    row: Row
    left: bool
    types: tuple
    variant: str
    sizes: str
    precision: str
    together: int  # matrices that share the launch

    def __str__(self):
        side = "left" if self.left else "right"
        types = "-".join(self.types)
        return f"sm_{self.arch}-{self.row}-{side}-{types}-{self.variant}-{self.sizes}-{self.precision}-{self.together}"

    def arguments(self, kernel):
        """Arguments of `compile_triton`, `kernel` being that of the row."""
        names = kernel.function.arg_names
        runtime = dict(kernel.tensors(self.types, self.variant))
        runtime |= {name: type_ for name, type_ in (SIZES | HYPER).items() if name in names}
        runtime |= {name: (runtime[name],) * self.together for name in kernel.each if name in runtime}
        config = dict(kernel.rows(self.arch)[self.row.kind, self.row.rank])
        options = {name: config.pop(name) for name in ("num_warps", "num_stages")} | configs.OPTIONS
        constants = {
            "LEFT": self.left,
            "STEP": "step" in self.variant,
            "PRECISION": self.precision,
            **config,
            **kernel.constants(self.variant, config),
        }
        return {
            "module": kernel.function.__module__,
            "name": kernel.function.__name__,
            "types": runtime,
            "constants": constants,
            "options": options,
            "arch": self.arch,
            "sizes": self.sizes,
        }


def variants(arch, row, kernel):
    """Everything the launchers make of one configuration."""
    sizes = {"odd": ("odd", "ones"), "any": EVERY_SIZE} | kernel.sizes
    sizes = sizes.get(row.kind, ("aligned", "row"))
    precisions = ["tf32x3", "tf32"] if row.kind in (32, "odd") else ["tf32x3"]
    return [
        Case(arch, row, left, tuple(types), variant, size, precision, together)
        for left, (types, variant), size, precision in itertools.product(sides(kernel), kernel.calls(row.kind), sizes, precisions)
        for together in ((1, configs.MOST) if kernel.each and "step" in variant else (1,))
    ]


def always(arch, row, kernel):
    """Builds that every architecture must have: left alone, right with several matrices in the launch."""
    sizes = "odd" if row.kind == "odd" else "aligned"
    return [
        Case(arch, row, left, tuple(types), variant, sizes, "tf32x3", 1 if left or not kernel.each else configs.MOST)
        for left in sides(kernel)
        for types, variant in kernel.always(row.kind, row.rank)
    ]


def sides(kernel):
    return (True, False) if "LEFT" in kernel.function.arg_names else (True,)
