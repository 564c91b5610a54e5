"""The kernels of the rules on R, and of the factors of a scaled gradient."""

from lowrank_sys.bench.static.kernel import FLOATS, Kernel
from lowrank_sys.kernels import channels, coefficient, configs, rule

RULE = dict.fromkeys(("low_rank_grad", "exp_avg", "exp_avg_sq", "scalars"), "*fp32") | {"alpha": "fp32"}
# APOLLO stores no N; squares come with a limiter, (BᵀB)R with a basis that is not orthonormal.
RATIOS = ("ratio", "ratio+squares", "ratio+out", "ratio+out+squares", "ratio+out+squares+gram_grad")
GIVEN = {"squares": "*fp32", "gram_grad": "*fp32"}


def given(variant):
    return {name: type_ for name, type_ in GIVEN.items() if name in variant.split("+")}


def rule_tensors(types, variant):
    if "step" in variant:
        return RULE | {"out": f"*{types[0]}"}
    return RULE | ({"out": "*fp32"} if "out" in variant else {}) | {"sums": "*fp32"} | given(variant)


def coefficient_tensors(types, variant):
    tensors = dict.fromkeys(("sums", "coefficients", "scalars"), "*fp32")
    tensors |= dict.fromkeys(("growth", "front", "behind"), "fp32")
    tensors |= {"limiter": "*fp32"} if "limiter" in variant else {}
    return tensors | ({} if variant == "channel" else {"norms": "*fp64", "counters": "*i32"})


KERNELS = {
    "rule": Kernel(
        rule.rule_kernel,
        lambda arch: {("any", 0): configs.RULE},
        lambda kind: [((out,), "step") for out in FLOATS] + [(("fp32",), variant) for variant in RATIOS],
        rule_tensors,
        each=("low_rank_grad", "out", "exp_avg", "exp_avg_sq"),
        product=False,
        constants=lambda variant, config: {"RULE": rule.RATIO.value if "ratio" in variant else rule.ADAM.value},
    ),
    "sums": Kernel(
        channels.sums_kernel,
        lambda arch: {("any", 0): configs.RULE},
        lambda kind: [((), variant) for variant in ("before", "before+squares", "before+squares+gram_grad", "after")],
        lambda types, variant: dict.fromkeys(("low_rank", "sums", "scalars"), "*fp32") | {"alpha": "fp32"} | given(variant),
        product=False,
        constants=lambda variant, config: {"BEFORE": "before" in variant},
    ),
    "coefficient": Kernel(
        coefficient.coefficient_kernel,
        lambda arch: {("any", 0): configs.COEFFICIENT},
        lambda kind: [((), variant) for variant in ("channel", "channel+limiter", "tensor", "tensor+limiter")],
        coefficient_tensors,
        product=False,
        constants=lambda variant, config: {"PER_TENSOR": "tensor" in variant},
    ),
}
