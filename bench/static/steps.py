"""The kernels of the scalars and of the projection."""

import itertools

from lowrank_sys.bench.static.kernel import FLOATS, Kernel
from lowrank_sys.kernels import configs, project, scalars

MOMENTS = dict.fromkeys(("exp_avg", "exp_avg_sq", "scalars"), "*fp32")
SAME = [("bf16", "bf16"), ("fp16", "fp16")]
MIXED = [("fp32", "fp32"), ("bf16", "fp32"), ("fp32", "bf16"), ("fp16", "fp32"), ("bf16", "fp16")]


def rows_of(kernel):
    """The rows of `kernel` in the tables of `configs`."""

    def rows(arch):
        return {
            (kind, rank): config
            for (name, kind), ranks in configs.TABLES[arch].items()
            if name == kernel
            for rank, config in ranks.items()
        }

    return rows


def in_one_type(count, variant, narrow=()):
    """`always` for a step at r = 128: every argument given, in one type throughout, and with a basis in INT4, beside 16-bit
    operands in the types `narrow` if they are given, else beside fp32."""

    def calls(kind, rank):
        if rank != 128:
            return []
        bf16, fp32 = ((type_,) * count for type_ in ("bf16", "fp32"))
        codes = (narrow or fp32, f"{variant}+int4")
        ours = {16: [(bf16, variant)], "large": [(bf16, variant)], 32: [(fp32, variant)]}.get(kind, [])
        return ours + [codes] if kind == (16 if narrow else 32) else ours

    return calls


def basis(type_, variant):
    """The basis, or its codes, scales and offsets."""
    return {"basis": "*u8", "scale": "*fp32", "offset": "*fp32"} if "int4" in variant else {"basis": f"*{type_}"}


def group(variant, config):
    return {"GROUP": 256 if "int4" in variant else 0}


def project_calls(kind):
    words = ["step", "step+split", "plain", "plain+split", "plain+squares", "plain+squares+split"]
    if kind == "large":
        words[0] = "step+pieces"  # R lies in scratch before Adam
    types = {16: SAME, "large": SAME, 32: MIXED, "odd": SAME + MIXED}[kind]
    # The codes of an INT4 basis take the gradient's type; an update is fp32 there.
    grads = {16: ("bf16", "fp16"), "large": (), 32: ("fp32",), "odd": FLOATS}[kind]
    int4 = [((grad, "fp32"), f"{word}+int4") for grad in grads for word in words]
    return list(itertools.product(types, words)) + int4


def project_tensors(types, variant):
    # The update has the basis' type; R itself is fp32.
    stepping = "step" in variant
    return (
        {"grad": f"*{types[0]}", "out": f"*{types[1]}" if stepping else "*fp32"}
        | basis(types[1], variant)
        | (MOMENTS if stepping else {})
        | ({"partials": "*fp32"} if "split" in variant or "pieces" in variant else {})
        | ({"counters": "*i32"} if "split" in variant else {})
        # Only a step that keeps R asks for its channels' squares.
        | ({"squares": "*fp32", "scalars": "*fp32"} if "squares" in variant else {})
    )


def scalars_tensors(types, variant):
    """Steps are fp32 counters or what a caller counts in; only random bits ask for numbers."""
    numbers = dict.fromkeys(("log_beta1", "log_beta2", "weight_decay", "scale"), "fp32")
    return (
        {"steps": f"*{types[0]}", "lr": f"*{types[1]}", "rows": "*fp32", "count": "i32"}
        | numbers
        | ({"draws": "*i64"} if "draws" in variant else {})
        | ({"grad_scale": "*fp32", "found_inf": "*fp32"} if "guarded" in variant else {})
    )


KERNELS = {
    "scalars": Kernel(
        scalars.scalars_kernel,
        lambda arch: {("any", 0): configs.SCALARS},
        lambda kind: list(itertools.product([("fp32", "fp32"), ("i64", "fp64")], ("plain", "draws", "advance+guarded+draws"))),
        scalars_tensors,
        product=False,
        sizes={"any": ("aligned",)},
        constants=lambda variant, config: {"ADVANCE": "advance" in variant},
    ),
    "project": Kernel(
        project.project_kernel,
        rows_of("project"),
        project_calls,
        project_tensors,
        always=in_one_type(2, "step+split", narrow=("bf16", "fp32")),
        constants=group,
        each=("grad", "basis", "scale", "offset", "out", "exp_avg", "exp_avg_sq"),
    ),
}
