"""The linear layer on INT8 and NF4 weights."""

import functools

from lowrank_sys.bench.static.kernel import FLOATS, Kernel
from lowrank_sys.kernels import configs
from lowrank_sys.kernels.int8_linear import int8_linear_kernel

SMALLEST, DEFAULT = 32, {False: 256, True: 64}  # groups, by whether the weight is NF4


def calls(kind):
    if kind == "odd":  # the smallest group cuts the tile
        return [((dtype,), f"{way}+small") for dtype in FLOATS for way in ("forward", "back", "forward+split", "back+split")]
    return [
        ((dtype,), way)
        for dtype in ({16: ("bf16", "fp16"), 32: ("fp32",)}[kind])
        for way in ("forward", "back", "forward+split", "back+split")
    ]


def always(kind, tokens):
    if kind == 16:
        return [(("bf16",), "forward+split")] if tokens < 128 else [(("bf16",), "forward"), (("fp16",), "back+split")]
    return [(("fp32",), "forward")] if kind == 32 else []


def tensors(types, variant, nf4):
    pointers = {"rows": f"*{types[0]}", "codes": "*u8" if nf4 else "*i8", "scale": "*fp32", "out": f"*{types[0]}", "t": "i32"}
    pointers |= {"partials": "*fp32", "counters": "*i32"} if "split" in variant else {}
    return pointers | ({} if "back" in variant else {"bias": "*fp32"})


def constants(variant, config, nf4):
    """A tile stays in one group."""
    group, axis = SMALLEST if "small" in variant else DEFAULT[nf4], "BLOCK_O" if "back" in variant else "BLOCK_D"
    return {"BACK": "back" in variant, "NF4": nf4, "GROUP": group, axis: min(config[axis], group)}


def rows(arch):
    table = configs.of_arch(configs.INT8_LINEAR, arch)
    return {(kind, tokens): config for kind, by_tokens in table.items() for tokens, config in by_tokens.items()}


KERNELS = {
    name: Kernel(
        int8_linear_kernel,
        rows,
        calls,
        functools.partial(tensors, nf4=nf4),
        always=always,
        constants=functools.partial(constants, nf4=nf4),
        limit="t",
        sizes={16: ("aligned",), 32: ("aligned",), "odd": ("odd",)},
    )
    for name, nf4 in (("int8_linear", False), ("nf4_linear", True))
}
