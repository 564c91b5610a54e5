"""Products in INT8."""

from lowrank_sys.bench.static.kernel import FLOATS, Kernel
from lowrank_sys.bench.static.steps import MOMENTS
from lowrank_sys.kernels import configs, int8_gemm


def project_calls(kind):
    return [((grad,), variant) for grad in FLOATS for variant in ("plain", "plain+split", "step", "step+split")]


def project_tensors(types, variant):
    return (
        {"grad": f"*{types[0]}", "codes": "*i8", "scale": "*fp32", "out": "*fp32"}
        | (MOMENTS if "step" in variant else {})
        | ({"partials": "*fp32", "counters": "*i32"} if "split" in variant else {})
    )


def back_project_tensors(types, variant):
    codes = dict.fromkeys(("rows", "columns"), "*i8") | dict.fromkeys(("row_scale", "column_scale", "scalars"), "*fp32")
    stream = {"seed": "i64", "parameter": "i32", "first": "i32"} | ({"draw_step": "*i64"} if "drawn" in variant else {})
    return {"param": f"*{types[0]}"} | codes | stream | ({"skipped": "*i64"} if "counted" in variant else {})


KERNELS = {
    "quantize_int8_operand": Kernel(
        int8_gemm.quantize_kernel,
        lambda arch: {("any", depth): configs.quantize_int8(depth) for depth in (256,)},
        lambda kind: [((x,), way) for x in FLOATS for way in ("columns", "rows")],
        lambda types, variant: {"x": f"*{types[0]}", "codes": "*i8", "scale": "*fp32"},
        constants=lambda variant, config: {"COLUMNS": variant == "columns"},
        product=False,
    ),
    "project_int8": Kernel(
        int8_gemm.project_int8_kernel,
        lambda arch: {(kind, 0): config for kind, config in configs.PROJECT_INT8.items()},
        project_calls,
        project_tensors,
        sizes={"aligned": ("aligned",)},
        own=False,
    ),
    "back_project_int8_gemm": Kernel(
        int8_gemm.back_project_int8_gemm_kernel,
        lambda arch: {("any", 0): configs.BACK_PROJECT_INT8_GEMM},
        lambda kind: (
            [((param,), variant) for param in FLOATS for variant in ("plain", "step", "step+counted")]
            + [((param,), "step+counted+drawn") for param in FLOATS if param != "fp32"]
        ),
        back_project_tensors,
        constants=lambda variant, config: {"ALIGNED": "drawn" in variant},
        own=False,
    ),
}
