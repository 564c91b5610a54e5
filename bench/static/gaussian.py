"""The kernel of a Gaussian basis that is made from its seed."""

import itertools

from lowrank_sys.bench.static.kernel import FLOATS, Kernel
from lowrank_sys.kernels import configs, gaussian

# What the launchers make of the seed: small numbers, large ones, or the four on the device.
SEEDS = ("short", "long", "key", "key+step")


def tensors(types, variant):
    """The four numbers that say which basis it is, and its gain; zeros beside a key. Only a step brings its scalars."""
    wide = "i64" if "long" in variant else "i32"
    numbers = {"seed": wide, "refresh": "i32", "parameter": "i32", "first": wide, "gain": "fp32"}
    return (
        {"out": f"*{types[0]}", "d": "i32", "rank": "i32"}
        | numbers
        | ({"key": "*i64"} if "key" in variant else {})
        | ({"scalars": "*fp32"} if "step" in variant else {})
    )


KERNELS = {
    "gaussian_basis": Kernel(
        gaussian.gaussian_basis_kernel,
        lambda arch: {("any", 0): configs.GAUSSIAN_BASIS},
        lambda kind: list(itertools.product(((dtype,) for dtype in FLOATS), SEEDS)),
        tensors,
        each=("out", "key"),
        product=False,
    )
}
