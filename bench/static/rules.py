"""The kernels of the rules on R, and of the factors of a scaled gradient."""

from lowrank_sys.bench.static.kernel import FLOATS, Kernel
from lowrank_sys.kernels import channels, configs, rule

MOMENTS = dict.fromkeys(("low_rank_grad", "exp_avg", "exp_avg_sq"), "*fp32")
NUMBERS = {"scalars": "*fp32"} | dict.fromkeys(("alpha", "growth", "front", "behind"), "fp32")
# A limiter asks for squares, and for (BᵀB)R with a basis that is not orthonormal.
MEASURED = ("", "+limited", "+limited+gram_grad")
RATIOS = [f"ratio{out}{measured}{each}" for out in ("", "+out") for measured in MEASURED for each in ("", "+tensor")]
SUMS = [f"before{measured}" for measured in MEASURED]
SUMS += [f"after{limited}{each}" for limited in ("", "+limited") for each in ("", "+tensor")]


def measured(variant):
    """What the squares of the channels are made from."""
    return ({"squares": "*fp32"} if "limited" in variant else {}) | ({"gram_grad": "*fp32"} if "gram_grad" in variant else {})


def coefficients(variant):
    """What a launch that ends with them is given: for a limiter and for one ratio its programs meet."""
    limited, tensor = "limited" in variant, "tensor" in variant
    meet = {"norms": "*fp64", "counters": "*i32"} if limited or tensor else {}
    return {"coefficients": "*fp32"} | meet | ({"limiter": "*fp32"} if limited else {})


def rule_tensors(types, variant):
    if "adam" in variant:
        return MOMENTS | NUMBERS | {"out": f"*{types[0]}"}
    # APOLLO stores no N.
    return MOMENTS | NUMBERS | measured(variant) | coefficients(variant) | ({"out": "*fp32"} if "out" in variant else {})


def sums_tensors(types, variant):
    return NUMBERS | {"low_rank": "*fp32", "sums": "*fp32"} | (measured if "before" in variant else coefficients)(variant)


KERNELS = {
    "rule": Kernel(
        rule.rule_kernel,
        lambda arch: {("any", 0): configs.RULE},
        lambda kind: [((out,), "adam+step") for out in FLOATS] + [(("fp32",), variant) for variant in RATIOS],
        rule_tensors,
        each=("low_rank_grad", "out", "exp_avg", "exp_avg_sq"),
        product=False,
        constants=lambda variant, config: {
            "RULE": rule.RATIO.value if "ratio" in variant else rule.ADAM.value,
            "PER_TENSOR": "tensor" in variant,
        },
    ),
    "sums": Kernel(
        channels.sums_kernel,
        lambda arch: {("any", 0): configs.RULE},
        lambda kind: [((), variant) for variant in SUMS],
        sums_tensors,
        product=False,
        constants=lambda variant, config: {"BEFORE": "before" in variant, "PER_TENSOR": "tensor" in variant},
    ),
}
