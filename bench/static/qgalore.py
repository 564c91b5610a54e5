"""The kernels that write INT8 weights."""

from lowrank_sys.bench.static.kernel import FLOATS, Kernel
from lowrank_sys.kernels import apollo_int8, configs, qgalore

RANK, DEFAULT, SMALLEST = 128, 256, 32  # of the table's rows; groups
STREAM = {"seed": "i64", "parameter": "i32", "first": "i32", "step": "*i64"}
WEIGHT = {"codes": "*i8", "weight_scale": "*fp32", "scalars": "*fp32"}


def group_of(variant):
    return SMALLEST if "small" in variant else DEFAULT


def words(kind):
    """A small group cuts the tile; odd rows may share draws or not; only lists count what they skip."""
    draws = ("", "+alone") if kind in ("odd", "any") else ("",)
    return [f"{form}{small}{draw}" for form in ("plain", "step", "step+counted") for small in ("", "+small") for draw in draws]


def back_calls(kind):
    # A step's update has the basis' type; `back_project_int8_` brings fp32, which an INT4 basis counts as.
    steps = [((dtype, dtype), word) for dtype in FLOATS for word in words(kind) if "step" in word]
    plain = [(("fp32", dtype), word) for dtype in FLOATS for word in words(kind) if "plain" in word]
    calls = steps + plain
    calls += [(types, f"{word}+int4") for types, word in calls if types == ("fp32", "fp32")]
    narrow = [call for call in calls if "fp32" not in call[0]]
    return {16: narrow, 32: [call for call in calls if call not in narrow], "odd": calls}[kind]


def back_tensors(types, variant):
    basis = {"basis": ("*u8",), "scale": ("*fp32",), "offset": ("*fp32",)} if "int4" in variant else {"basis": (f"*{types[1]}",)}
    return WEIGHT | STREAM | basis | {"low_rank": f"*{types[0]}"} | ({"skipped": "*i64"} if "counted" in variant else {})


def back_constants(variant, config):
    blocks = configs.back_project_int8_config(config["KIND"], RANK, group_of(variant))
    return {name: value for name, value in blocks.items() if name.startswith("BLOCK")} | {
        "GROUP": DEFAULT if "int4" in variant else 0,
        "INT8_GROUP": group_of(variant),
        "ALIGNED": "alone" not in variant,
    }


def scaled_tensors(types, variant):
    return (
        WEIGHT | STREAM | {"grad": f"*{types[0]}", "coefficients": "*fp32"} | ({"skipped": "*i64"} if "counted" in variant else {})
    )


def scaled_constants(variant, config):
    blocks = configs.scaled_int8(group_of(variant))
    return {name: value for name, value in blocks.items() if name.startswith("BLOCK")} | {
        "INT8_GROUP": group_of(variant),
        "ALIGNED": "alone" not in variant,
    }


KERNELS = {
    "back_project_int8": Kernel(
        qgalore.back_project_int8_kernel,
        lambda arch: {
            (kind, 0): configs.back_project_int8_config(kind, RANK, DEFAULT) | {"KIND": kind} for kind in configs.BACK_PROJECT_INT8
        },
        back_calls,
        back_tensors,
        own=False,
        constants=back_constants,
        always=lambda kind, rank: [(("fp32", "fp32"), "step+counted+int4")] if kind == 32 else [],
    ),
    "scaled_int8": Kernel(
        apollo_int8.scaled_int8_kernel,
        lambda arch: {("any", 0): configs.scaled_int8(DEFAULT)},
        lambda kind: [((dtype,), word) for dtype in FLOATS for word in words(kind) if "step" in word],
        scaled_tensors,
        product=False,
        constants=scaled_constants,
    ),
}
