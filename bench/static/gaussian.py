"""The kernels of a Gaussian basis that is made from its seed."""

import itertools

from lowrank_sys.bench.static.kernel import EVERY_SIZE, FLOATS, Kernel
from lowrank_sys.kernels import configs, gaussian

# What the launchers make of the seed: small numbers, large ones, or the four on the device.
SEEDS = ("short", "long", "key")
PRODUCT = {32: EVERY_SIZE}  # the basis is fp32


def numbers(variant):
    """The four numbers that say which basis it is, and its gain; zeros beside a key."""
    wide = "i64" if "long" in variant else "i32"
    return {"seed": wide, "refresh": "i32", "parameter": "i32", "first": wide, "gain": "fp32"}


def basis_tensors(types, variant):
    return {"out": f"*{types[0]}", "d": "i32", "rank": "i32"} | numbers(variant)


def project_calls(kind):
    variants = [
        f"{seed}{squares}{split}"
        for seed in SEEDS
        for split in ("", "+split")
        for squares in (("", "+squares") if seed == "key" else ("",))
    ]  # only a step asks for them
    return list(itertools.product(((dtype,) for dtype in FLOATS), variants))


def project_tensors(types, variant):
    return (
        {"grad": f"*{types[0]}", "out": "*fp32"}
        | numbers(variant)
        | ({"key": "*i64", "scalars": "*fp32"} if "key" in variant else {})
        | ({"squares": "*fp32"} if "squares" in variant else {})
        | ({"partials": "*fp32", "counters": "*i32"} if "split" in variant else {})
    )


def back_project_tensors(types, variant):
    return {"param": f"*{types[0]}", "low_rank": "*fp32", "alpha": "fp32", "beta": "fp32"} | numbers(variant)


def without_key(kind):
    return list(itertools.product(((dtype,) for dtype in FLOATS), ("short", "long")))


KERNELS = {
    "gaussian_basis": Kernel(
        gaussian.gaussian_basis_kernel, lambda arch: {("any", 0): configs.GAUSSIAN_BASIS}, without_key, basis_tensors, product=False
    ),
    "gaussian_project": Kernel(
        gaussian.gaussian_project_kernel,
        lambda arch: {(32, rank): config for rank, config in configs.gaussian_project(arch).items()},
        project_calls,
        project_tensors,
        sizes=PRODUCT,
    ),
    "gaussian_back_project": Kernel(
        gaussian.gaussian_back_project_kernel,
        lambda arch: {(32, 0): configs.GAUSSIAN_BACK_PROJECT},
        without_key,
        back_project_tensors,
        sizes=PRODUCT,
    ),
}
