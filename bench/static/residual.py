"""The kernels of the steps that use what a basis does not hold."""

import itertools

from lowrank_sys.bench.static.kernel import EVERY_SIZE, FLOATS, Kernel
from lowrank_sys.kernels import configs, residual

SMALL = 16  # a rank that cuts the tile

RATIO = dict.fromkeys(("exp_avg", "exp_avg_sq", "low_rank_grad", "sums", "scalars"), "*fp32") | {"alpha": "fp32"}
RATIO_CALLS = ("apollo", "apollo+squares", "out", "out+squares", "out+squares+gram_grad")
# FRUGAL has no coefficients; only lists count what they skip.
LIMITED = ("limited", "limited+counted")
PLAIN = ("plain", "plain+counted")


def ratio_tensors(types, variant):
    """APOLLO stores no N; squares come with a limiter, (BᵀB)R with a basis that is not orthonormal."""
    given = {"out": "*fp32", "squares": "*fp32", "gram_grad": "*fp32"}
    return RATIO | {name: type_ for name, type_ in given.items() if name in variant.split("+")}


def coefficient_tensors(types, variant):
    tensors = dict.fromkeys(("sums", "coefficients", "scalars"), "*fp32")
    tensors |= dict.fromkeys(("growth", "front", "behind"), "fp32")
    tensors |= {"limiter": "*fp32"} if "limiter" in variant else {}
    return tensors | ({} if variant == "channel" else {"norms": "*fp64", "counters": "*i32"})


def residual_calls(*variants):
    """Types of weight, gradient and basis: any each."""
    words = [f"{variant}{small}" for variant in variants for small in ("", "+small")]
    return lambda kind: list(itertools.product(itertools.product(FLOATS, repeat=3), words))


def residual_tensors(types, variant):
    return scaled_tensors(types, variant) | {"basis": f"*{types[2]}", "low_rank": "*fp32", "low_rank_grad": "*fp32"}


def scaled_tensors(types, variant):
    return (
        {"param": f"*{types[0]}", "grad": f"*{types[1]}", "scalars": "*fp32", "scale": "fp32", "residual_scale": "fp32"}
        | ({"coefficients": "*fp32"} if "limited" in variant else {})
        | ({"skipped": "*i64"} if "counted" in variant else {})
    )


def rule(number):
    """Constants of a rule; the depth of the tile is that of the launcher."""

    def constants(variant, config):
        block = configs.residual_config(number, SMALL)["BLOCK_R"] if "small" in variant else config["BLOCK_R"]
        return {"RULE": number, "CORRECTED": "limited" in variant, "BLOCK_R": block}

    return constants


def rows(number, kind):
    return lambda arch: {(kind, 0): configs.RESIDUAL[number]}


KERNELS = {
    "ratio": Kernel(
        residual.ratio_kernel,
        lambda arch: {("any", 0): configs.ADAM},
        lambda kind: [((), variant) for variant in RATIO_CALLS],
        ratio_tensors,
        product=False,
    ),
    "coefficient": Kernel(
        residual.coefficient_kernel,
        lambda arch: {("any", 0): configs.COEFFICIENT},
        lambda kind: [((), variant) for variant in ("channel", "channel+limiter", "tensor", "tensor+limiter")],
        coefficient_tensors,
        product=False,
        constants=lambda variant, config: {"PER_TENSOR": "tensor" in variant},
    ),
    "residual_scaled": Kernel(
        residual.residual_kernel,
        rows(residual.SCALED.value, "any"),
        lambda kind: list(itertools.product(itertools.product(FLOATS, repeat=2), LIMITED)),
        scaled_tensors,
        product=False,
        constants=rule(residual.SCALED.value),
    ),
    "residual_combined": Kernel(
        residual.residual_kernel,
        rows(residual.COMBINED.value, 32),
        residual_calls(*LIMITED, *PLAIN),
        residual_tensors,
        constants=rule(residual.COMBINED.value),
        sizes={32: EVERY_SIZE},
    ),
    "residual_signed": Kernel(
        residual.residual_kernel,
        rows(residual.SIGNED.value, 32),
        residual_calls(*PLAIN),
        residual_tensors,
        constants=rule(residual.SIGNED.value),
        sizes={32: EVERY_SIZE},
    ),
}
