"""The update of the weights: one kernel, by how they are stored and by what is added to back(X)."""

import itertools

from lowrank_sys.bench.static.kernel import EVERY_SIZE, FLOATS, Kernel
from lowrank_sys.bench.static.steps import basis, group, in_one_type, rows_of
from lowrank_sys.kernels import apply, configs

RANK, DEFAULT, SMALLEST = 128, 256, 32  # of the table's rows; groups of INT8 weights
SMALL = 16  # a rank that cuts the tile
NUMBERS = {"gain": "fp32", "residual_scale": "fp32", "scalars": "*fp32"}
STREAM = {"seed": "i32", "parameter": "i32", "first": "i32"}
INT8 = {"weight": ("*i8",), "weight_scale": "*fp32", "step": "*i64"} | STREAM | {"seed": "i64"}


def counted(variant):
    """Only lists count what they leave out; 16 bits that are rounded stochastically have a step of their random bits."""
    return ({"skipped": "*i64"} if "counted" in variant else {}) | ({"step": "*i64"} if "drawn" in variant else {})


def one(tensors):
    """Of a launch for one matrix."""
    return {name: (type_,) for name, type_ in tensors.items()}


# back(X) alone into floats: an update has the basis' type; `back_project_` brings fp32. Types of X, basis and weight.
def float_calls(kind):
    types = list(itertools.product(FLOATS, FLOATS))
    steps = [((basis, basis, weight), variant) for basis, weight in types for variant in ("step", "step+counted")]
    steps += [((basis, basis, weight), "step+counted+drawn") for basis, weight in types if weight != "fp32"]
    plain = [(("fp32", basis, weight), "plain") for basis, weight in types]
    plain += [(types, f"{variant}+int4") for types, variant in steps + plain if types[:2] == ("fp32", "fp32")]
    narrow = [call for call in steps if "fp32" not in call[0]]
    return {16: narrow, 32: [call for call in steps + plain if call not in narrow], "odd": steps + plain}[kind]


def float_tensors(types, variant):
    return {"low_rank": f"*{types[0]}", "weight": f"*{types[2]}"} | basis(types[1], variant) | NUMBERS | STREAM | counted(variant)


# With a residual: types of the weight, the gradient and, with a product, the basis. FRUGAL has no coefficients.
RESIDUALS = {
    "scaled": ("scaled+limited", "scaled+limited+counted"),
    "combined": ("combined+limited", "combined+limited+counted", "combined", "combined+counted"),
    "signed": ("signed", "signed+counted"),
}


def residual_calls(name, weights, draws=("",)):
    """A small rank cuts the tile of a product."""
    words = [f"{word}{draw}" for word in RESIDUALS[name] for draw in draws]
    if name == "scaled":
        return list(itertools.product(itertools.product(weights, FLOATS), words))
    words = [f"{word}{shallow}" for word in words for shallow in ("", "+shallow")]
    calls = list(itertools.product(itertools.product(weights, FLOATS, FLOATS), words))
    return calls + [(types, f"{word}+int4") for types, word in calls if types[2] == "fp32"]


def residual_tensors(types, variant):
    weight = INT8 if types[0] == "int8" else {"weight": (f"*{types[0]}",)} | STREAM
    tensors = weight | NUMBERS | {"grad": f"*{types[1]}"} | counted(variant)
    tensors |= {"coefficients": "*fp32"} if "limited" in variant else {}
    if "scaled" in variant:
        return tensors
    return tensors | {"low_rank": ("*fp32",), "low_rank_grad": "*fp32"} | one(basis(types[2], variant))


# back(X) into INT8, types of X and basis; and every residual. A small group cuts the tile; odd rows share draws or not; a tile of
# odd sizes is a residual's, too.
def draws(kind):
    alone = ("", "+alone") if kind in ("odd", "any") else ("",)
    return [f"{small}{draw}" for small in ("", "+small") for draw in alone]


def int8_calls(kind):
    plain, steps = ([f"{word}{draw}" for word in words for draw in draws(kind)] for words in (("plain",), ("step", "step+counted")))
    calls = [*itertools.product([(dtype, dtype) for dtype in FLOATS], steps)]
    calls += itertools.product([("fp32", dtype) for dtype in FLOATS], plain)
    calls += [(types, f"{word}+int4") for types, word in calls if types == ("fp32", "fp32")]
    narrow = [call for call in calls if "fp32" not in call[0]]
    residuals = [call for name in ("combined", "signed") for call in residual_calls(name, ("int8",), draws(kind))]
    return {16: narrow, 32: [call for call in calls if call not in narrow], "odd": calls + residuals}[kind]


def int8_tensors(types, variant):
    if types[0] == "int8":
        return residual_tensors(types, variant)
    return INT8 | one({"low_rank": f"*{types[0]}"} | basis(types[1], variant)) | NUMBERS | counted(variant)


PHIS = {"scaled": apply.SCALED, "combined": apply.SCALED, "signed": apply.SIGNED}


def constants(variant, config):
    """Of an INT8 weight if the configuration has a kind in its table."""
    phi, rank = PHIS.get(variant.split("+")[0], apply.NONE), SMALL if "shallow" in variant else RANK
    int8 = "KIND" in config
    size = (SMALLEST if "small" in variant else DEFAULT) if int8 else 0
    if int8:
        blocks = configs.apply_int8(configs.APPLY_INT8[config["KIND"]], 0 if "scaled" in variant else rank, size)
    else:
        blocks = config | ({"BLOCK_R": SMALL} if rank == SMALL else {})
    return group(variant, config) | {
        "PHI": phi.value,
        "STEP": "plain" not in variant,
        "INT8_GROUP": size,
        "ALIGNED": (int8 or "drawn" in variant) and "alone" not in variant,
        **{name: value for name, value in blocks.items() if name.startswith("BLOCK")},
    }


def residual(name, kind, config):
    """The entry of a residual beside weights in floats."""
    return Kernel(
        apply.apply_kernel,
        lambda arch: {(kind, 0): config},
        lambda kind: residual_calls(name, FLOATS),
        residual_tensors,
        product=name != "scaled",
        constants=constants,
        sizes={32: EVERY_SIZE},
    )


def int8_row(kind, rank=RANK):
    """A launch at the usual rank and groups, and what it is made from."""
    return configs.apply_int8(configs.APPLY_INT8[kind], rank, DEFAULT) | {"KIND": kind}


KERNELS = {
    "apply": Kernel(
        apply.apply_kernel,
        rows_of("back_project"),
        float_calls,
        float_tensors,
        always=in_one_type(3, "step+counted"),
        constants=constants,
        each=("weight", "low_rank", "basis", "scale", "offset"),
    ),
    "apply_scaled": residual("scaled", "any", configs.APPLY_RESIDUAL[0]),
    "apply_combined": residual("combined", 32, configs.APPLY_RESIDUAL[1]),
    "apply_signed": residual("signed", 32, configs.APPLY_RESIDUAL[2]),
    "apply_int8": Kernel(
        apply.apply_kernel,
        lambda arch: {(kind, 0): int8_row(kind) for kind in configs.APPLY_INT8},
        int8_calls,
        int8_tensors,
        own=False,
        constants=constants,
        always=lambda kind, rank: [(("fp32", "fp32"), "step+counted+int4")] if kind == 32 else [],
        sizes={"odd": EVERY_SIZE},
    ),
    "apply_int8_scaled": Kernel(
        apply.apply_kernel,
        lambda arch: {("any", 0): int8_row("odd", 0)},
        lambda kind: residual_calls("scaled", ("int8",), draws(kind)),
        residual_tensors,
        product=False,
        constants=constants,
    ),
}
