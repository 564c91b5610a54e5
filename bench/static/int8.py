"""The linear layer on INT8 weights."""

from lowrank_sys.bench.static.kernel import FLOATS, Kernel
from lowrank_sys.kernels import configs
from lowrank_sys.kernels.int8_linear import int8_linear_kernel

SMALLEST, DEFAULT = 32, 256  # groups


def calls(kind):
    if kind == "odd":  # the smallest group cuts the tile
        return [((dtype,), f"{way}+small") for dtype in FLOATS for way in ("forward", "back")]
    return [((dtype,), way) for dtype in ({16: ("bf16", "fp16"), 32: ("fp32",)}[kind]) for way in ("forward", "back")]


def always(kind, rank):
    return {16: [(("bf16",), "forward"), (("fp16",), "back")], 32: [(("fp32",), "forward")]}.get(kind, [])


def tensors(types, variant):
    pointers = {"rows": f"*{types[0]}", "codes": "*i8", "scale": "*fp32", "out": f"*{types[0]}", "t": "i32"}
    return pointers | ({} if "back" in variant else {"bias": "*fp32"})


def constants(variant, config):
    """A tile stays in one group."""
    group, axis = SMALLEST if "small" in variant else DEFAULT, "BLOCK_O" if "back" in variant else "BLOCK_D"
    return {"BACK": "back" in variant, "GROUP": group, axis: min(config[axis], group)}


KERNELS = {
    "int8_linear": Kernel(
        int8_linear_kernel, lambda arch: {(kind, 0): config for kind, config in configs.INT8_LINEAR.items()}, calls, tensors,
        always=always, constants=constants, sizes={16: ("aligned",), 32: ("aligned",), "odd": ("odd",)}, own=False),
}
